"""What a process does when it is asked to stop, by each signal and at each time."""

import subprocess
import sys
import textwrap

import pytest

BEGINNING = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as a job script leaves it
from megasd.process import interrupt

def ask(name, everyone=False):
    os.killpg(0, signal.Signals[name]) if everyone else os.kill(os.getpid(), signal.Signals[name])

def is_asked():
    try:
        for _ in range(500):
            interrupt.raise_if_asked()
            time.sleep(0.001)
    except interrupt.StopError:
        return True
    return False

"""


def run(program: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "code"), [("SIGUSR1", 85), ("SIGHUP", 85), ("SIGTERM", 85), ("SIGINT", 130)]
)
def test_where_there_is_nothing_to_save_a_process_ends_at_once_whatever_it_is_doing(
    name: str, code: int
) -> None:
    """Here in native code, which lets no handler of Python run."""
    program = f"""
        import ctypes
        interrupt.listen()
        interrupt.after_this("go on with `megasd train --resume RUN`")
        ask("{name}")
        ctypes.CDLL(None).sleep(60)
        print("not reached")
    """
    sentence = f"\nmegasd: ended by {name}: go on with `megasd train --resume RUN`\n"
    assert run(program) == (code, "", sentence)


def test_in_the_loop_a_stop_is_its_to_heed_and_harms_no_process_that_the_rank_started() -> None:
    """However often USR1 comes, and twice the signal that a launcher handed on in two ways."""
    program = """
        interrupt.listen()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
        try:
            with interrupt.heeded_by_the_loop():
                interrupt.raise_if_asked()
                for name in ("SIGUSR1", "SIGUSR1", "SIGTERM", "SIGTERM", "SIGINT"):
                    ask(name, everyone=True)
                    assert is_asked()
                    time.sleep(0.02)
                    print(name, interrupt.exit_code())
                interrupt.raise_if_asked()
        except interrupt.StopError:
            print("saves", child.wait())
    """
    code, out, errors = run(program)
    assert code == 0, errors
    assert out.splitlines() == [
        *["SIGUSR1 85", "SIGUSR1 85", "SIGTERM 85", "SIGTERM 85", "SIGINT 130"],
        "saves 0",
    ]
    assert errors.count("megasd: ") == 1


def test_a_stop_that_comes_too_late_for_the_loop_ends_the_process_after_it() -> None:
    program = """
        interrupt.listen()
        with interrupt.heeded_by_the_loop():
            ask("SIGTERM")
            assert is_asked()
        print("not reached")
    """
    code, out, errors = run(program)
    assert (code, out) == (85, ""), errors


def test_a_library_that_unblocks_a_signal_does_not_undo_it() -> None:
    program = """
        interrupt.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        with interrupt.heeded_by_the_loop():
            ask("SIGTERM")
            assert is_asked()
            os._exit(3)
    """
    assert run(program)[0] == 3


def test_what_a_shell_started_in_the_background_does_not_hear_its_terminal() -> None:
    program = """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupt.listen()
        ask("SIGINT")
        ask("SIGHUP")
        time.sleep(0.05)
        print("goes on")
    """
    assert run(program) == (0, "goes on\n", "")


def test_whoever_insists_ends_it_at_once() -> None:
    program = """
        interrupt.SAME_SIGNAL_SECONDS = 0
        interrupt.listen()
        with interrupt.heeded_by_the_loop():
            for name in ("SIGUSR1", "SIGUSR1", "SIGINT"):
                ask(name)
                assert is_asked()
            while interrupt.exit_code() != interrupt.INTERRUPTED:
                time.sleep(0.001)
            ask("SIGTERM")
            time.sleep(60)
    """
    code, out, errors = run(program)
    assert (code, out) == (143, "")
    assert errors.splitlines()[-1].startswith("megasd: ended by SIGTERM: ")
    assert "Traceback" not in errors
