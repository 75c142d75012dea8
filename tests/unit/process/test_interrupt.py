import subprocess
import sys

PROGRAM = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as the job script leaves it
from megasd.process import interrupt
interrupt.listen()
assert not interrupt.is_asked()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
os.killpg(0, signal.SIGUSR1)
assert interrupt.is_asked() and interrupt.is_asked()
print("child", child.wait())
"""


def test_the_signal_is_noticed_and_harms_no_process_that_the_rank_started() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, start_new_session=True
    )
    assert (done.returncode, done.stdout) == (0, "child 0\n"), done.stderr
