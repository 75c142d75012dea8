"""One process at a time, whatever became of the one before."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megasd.process import lock

HOLD = """
import pathlib, sys, time
from megasd.process import lock
held = lock.take(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_names_who_holds_it_and_ends_with_the_process_that_was_killed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "owner"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        named = rf"^process {other.pid} on {socket.gethostname()}$"
        with pytest.raises(lock.HeldError, match=named):
            lock.take(path)
        other.send_signal(signal.SIGKILL)
    with lock.take(path), pytest.raises(lock.HeldError, match=f"process {os.getpid()} "):
        lock.take(path)
    lock.take(path).close()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre without the mount option `flock` answers."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"owner: this file system cannot lock files"):
        lock.take(tmp_path / "owner").close()
