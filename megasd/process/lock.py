"""What one process may use at a time: it holds a file locked, and the file says who it is."""

import contextlib
import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import IO


class HeldError(Exception):
    """Another process has the lock; the text names it."""


def take(path: Path) -> IO[str]:
    """The file, locked until it is closed: at the latest when the process ends, however it does.

    Raises HeldError. A file system that knows no locks, as some network ones are mounted, is no
    error: a warning says that nothing is held.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise HeldError(holder) from None
    except OSError as error:
        warnings.warn(
            f"{path}: this file system cannot lock files ({error.strerror}); nothing keeps another "
            "process away, so start no second one",
            stacklevel=2,
        )
    with contextlib.suppress(OSError):  # no room: the lock holds without a name
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file
