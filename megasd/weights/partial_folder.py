"""A folder that is written file by file, goes on where a killed process stopped, and appears whole.

`TARGET` is written as `.TARGET.partial` beside it. A journal there holds size and checksum of
every file that is complete and forced to disk; whatever else is there is written again.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megasd.process import lock
from megasd.process.errors import TryAgainError, may_pass
from megasd.weights.hf_folder import require_empty

_JOURNAL, _LOCK = "journal.json", "lock"
_BLOCK = 2**24

Bytes = bytes | memoryview


class PartialFolder:
    """What becomes `target`. `purpose` says what is made of what: JSON values only.

    A context: one that ends by an error of the disk, or a killed process, keeps what is complete;
    any other error leaves nothing. Raises ValueError when `target` is not empty or what lies there
    already was begun for another purpose, TryAgainError when another process writes it or the disk
    is full.
    """

    def __init__(
        self, target: Path, purpose: dict[str, Any], report: Callable[[int], None]
    ) -> None:
        require_empty(target)
        self.target, self.purpose, self.report = target, purpose, report
        self.path = target.with_name(f".{target.name}.partial")
        self.complete: dict[str, list[int]] = {}  # size and checksum by file

    def __enter__(self) -> "PartialFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.take(self.path / _LOCK)
        except OSError as error:
            raise self._failed(error) from error
        except lock.HeldError as holder:
            raise TryAgainError(f"{self.path} is being written by {holder}") from None
        self._take_up()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self._lock.close()
        of_the_disk = isinstance(error, OSError) or not isinstance(error, Exception)
        if error is not None and not (of_the_disk and self.complete):
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._failed(error) from error

    def _take_up(self) -> None:
        if begun := self._begun():
            if differing := [k for k, v in self.purpose.items() if begun["purpose"].get(k) != v]:
                raise ValueError(
                    f"{self.path} was begun from something else ({', '.join(differing)} differ); "
                    "remove it, or give the same source and options to go on with it"
                )
            self.complete = {
                name: said
                for name, said in begun["files"].items()
                if _summed(self.path / name) == said
            }
        for found in sorted(self.path.rglob("*"), reverse=True):
            name = str(found.relative_to(self.path))
            if name in (_JOURNAL, _LOCK, *self.complete):
                continue
            if not found.is_dir():
                found.unlink()
            elif not any(found.iterdir()):
                found.rmdir()

    def _begun(self) -> dict[str, Any] | None:
        """The journal; None when there is none, or only what a crash of the machine left of it."""
        try:
            return json.loads((self.path / _JOURNAL).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def write(self, name: str, blocks: Iterable[Bytes]) -> None:
        """Writes one file, if it is not complete yet."""
        if name in self.complete:
            self.report(self.complete[name][0])
            return
        file, size, crc = self.path / name, 0, 0
        with file.open("wb") as out, ThreadPoolExecutor(1) as beside:
            for block in blocks:
                summed = beside.submit(zlib.crc32, block, crc)
                out.write(block)
                size, crc = size + len(block), summed.result()
                self.report(len(block))
            out.flush()
            os.fsync(out.fileno())
        self._note(name, [size, crc])

    def finish(self) -> None:
        """The folder gets its name: nothing may be missing any more."""
        for name in (_JOURNAL, _LOCK):
            (self.path / name).unlink()
        for path in (*self.path.rglob("*"), self.path):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self.path.rename(self.target)

    def _note(self, name: str, said: list[int]) -> None:
        self.complete[name] = said
        new = self.path / f"{_JOURNAL}.new"
        new.write_text(json.dumps({"purpose": self.purpose, "files": self.complete}, indent=1))
        new.rename(self.path / _JOURNAL)

    def _failed(self, error: OSError) -> ValueError | TryAgainError:
        reason = error.strerror or str(error)
        kept = f"; {len(self.complete)} complete files are kept in {self.path}, "
        kept += "run the same command again to go on, or remove that folder"
        return (TryAgainError if may_pass(error) else ValueError)(
            f"{self.target} could not be written ({reason}): make room or choose another place"
            + (kept if self.complete else "")
        )


def _summed(file: Path) -> list[int] | None:
    """Size and checksum of a file; None when there is none."""
    if not file.is_file():
        return None
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return [file.stat().st_size, crc]
