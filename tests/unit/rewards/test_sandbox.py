"""What a program in the sandbox can do, and what stops it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megasd.rewards import sandbox
from megasd.rewards.sandbox import Limits, SandboxError, run

REPOSITORY = Path(__file__).parents[3]


def processes_of(parent: int) -> list[int]:
    """All processes of sandboxes that `parent` started: they have its id as last argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"jail.main" in word for word in words) and words[-2:-1] == [b"%d" % parent]:
            found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_a_script_reads_stdin_and_its_output_and_exit_code_come_back():
    ended = run(
        "import sys\nprint(input()[::-1])\nsys.exit(print('!', file=sys.stderr) or 7)", stdin="äb\n"
    )
    assert (ended.stdout, ended.stderr, ended.exit_code) == ("bä\n", "!\n", 7)


def test_an_expression_is_evaluated_after_the_program_and_its_main_guard_stays_shut():
    ended = run(
        "def f(*a): return a, {1: {2}}\nif __name__ == '__main__': 1 / 0",
        expression="f",
        args=[1, "x"],
    )
    value, shown = json.loads(ended.result)
    assert value == [[1, "x"], {"dict": [[1, {"set": [2]}]]}]
    assert shown == "((1, 'x'), {1: {2}})"


def test_a_traceback_shows_the_programs_lines_and_none_of_ours():
    ended = run("def f(x):\n    return x / 0\n", expression="f(1)")
    assert 'File "solution.py", line 2, in f\n    return x / 0' in ended.stderr
    assert "jail" not in ended.stderr
    assert ended.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert (ended.exit_code, ended.result) == (1, "")


ORDINARY = """
import array, asyncio, ctypes, datetime, decimal, hashlib, itertools, os, random, re, resource
import sqlite3, ssl, sys, tempfile, threading, zoneinfo
sys.setrecursionlimit(10**6)
resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(resource.RLIMIT_STACK))
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
async def late():
    await asyncio.sleep(0.001)
    return 5
def work(): print("thread", depth(50_000))
thread = threading.Thread(target=work)
thread.start()
print(asyncio.run(late()), zoneinfo.ZoneInfo("UTC"), len(os.urandom(3)), open(os.devnull).read())
exit()
"""


def test_ordinary_programs_work():
    """Threads that outlive the main one, asyncio, deep recursion, the builtins of site."""
    ended = run(ORDINARY)
    assert (ended.stderr, ended.exit_code) == ("", 0)
    assert sorted(ended.stdout.split("\n")) == ["", "5 UTC 3 ", "thread 50000"]


def test_a_program_has_a_directory_of_its_own_in_memory():
    code = (
        "import os, tempfile\n"
        "with tempfile.NamedTemporaryFile() as file:\n"
        "    print(file.write(b'123'), os.getcwd() == os.environ['HOME'])\n"
        "    print(os.path.dirname(file.name) == os.getcwd())\n"
    )
    ended = run(code)
    if "namespaces" not in ended.layers:
        pytest.skip("without namespaces a program has no directory")
    assert ended.stdout == "3 True\nTrue\n"


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time\ntime.sleep(3600)", "input()\n" * 3]
)
def test_what_does_not_end_is_stopped_by_the_clock(code):
    if code.startswith("input"):  # ends by itself: stdin is empty, not a terminal to wait for
        assert run(code).stderr.endswith("EOFError: EOF when reading a line\n")
        return
    started = time.monotonic()
    ended = run(code, limits=Limits(seconds=0.5))
    assert ended.stopped == "time"
    assert time.monotonic() - started < 20.0
    wait_until(lambda: not processes_of(os.getpid()))


def test_processor_time_is_limited_too():
    """Threads, or a stopped parent, could use more of it than the clock shows."""
    code = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))"
    assert run(code, limits=Limits(seconds=2.0)).stdout == "(3, 4)\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_is_cut_and_ends_the_program(stream):
    code = f"import sys\nfor _ in range(10**5): sys.{stream}.write('x' * 10**4)"
    ended = run(code, limits=Limits(seconds=10.0, output_bytes=100_000))
    assert ended.stopped == "output"
    assert 100_000 < len(getattr(ended, stream)) < 200_000
    wait_until(lambda: not processes_of(os.getpid()))


def test_a_program_may_close_or_break_its_own_channels_without_hanging_us():
    code = "import os\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass\n"
    ended = run(code + "os._exit(0)", expression="1", limits=Limits(seconds=5.0))
    assert (ended.stopped, ended.result) == ("", "")


def test_it_dies_with_the_process_that_asked_even_when_that_is_killed():
    code = (
        "from megasd.rewards.sandbox import *\n"
        "run('import time; time.sleep(600)', limits=Limits(seconds=600.0))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    wait_until(lambda: len(processes_of(parent.pid)) == 3)  # supervisor, init, program
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not processes_of(parent.pid))


def test_nothing_runs_on_a_machine_that_cannot_contain_it():
    for without in ("seccomp", "rlimits", "no capabilities", "namespaces landlock"):
        names = without.split() if "landlock" in without else [without]
        with pytest.raises(SandboxError, match=r"cannot contain a program: no .*switched off"):
            run("print('ran')", without=tuple(names))


def test_a_layer_that_is_missing_is_said_once_and_loudly(monkeypatch):
    real = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda text: real(text, without=("no root",)))
    sandbox.check.cache_clear()
    with pytest.warns(
        UserWarning, match=r"lacks: .*no root \(switched off\).*contained by: .*seccomp"
    ):
        assert sandbox.check() is None
    monkeypatch.setattr(sandbox, "run", lambda text: real(text, without=("seccomp",)))
    sandbox.check.cache_clear()
    assert "cannot contain a program: no seccomp" in str(sandbox.check())
    sandbox.check.cache_clear()


def test_the_sandbox_starts_without_megasd_and_without_site_packages():
    ended = run(
        "import sys\nprint([m for m in sys.modules if 'megasd' in m or 'torch' in m], sys.path)"
    )
    assert ended.stdout.startswith("[] [")
    assert "site-packages" not in ended.stdout
    assert "megasd" not in ended.stdout.partition("] ")[2]
