"""Files that are whole or not there, whatever ends the process or its node."""

import contextlib
import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Makes or replaces a file by a rename; on the disk when it returns. May raise OSError."""
    replacement = path.with_name(f"{path.name}.new")
    with replacement.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)
    force_to_disk(path.parent)


def append_durably(path: Path, text: str) -> None:
    """All of `text`, on the disk when it returns; else raises OSError, and takes a part back."""
    is_new = not path.exists()
    with path.open("ab", buffering=0) as file:  # what a buffer kept would be written once more
        size, rest = file.tell(), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise
    if is_new:
        force_to_disk(path.parent)


def force_to_disk(*paths: Path) -> None:
    """Files; and folders, for the names in them, where the file system can do that."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not path.is_dir():
                raise
        finally:
            os.close(handle)
