"""What a checkpoint's files should be: manifest.json, with the size and the CRC-32 of each."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_CHUNK = 16 * 2**20  # bytes read at once

Files = dict[
    str, dict[str, Any]
]  # by path within the checkpoint: {"bytes": 12, "crc32": "0a1b2c3d"}


def describe(folder: Path, names: Sequence[str]) -> Files:
    """The entries of files as they are read back."""
    return {name: _describe(folder / name) for name in names}


def write_manifest(folder: Path, files: Files) -> None:
    """Last of all files: a checkpoint without it was not finished."""
    text = json.dumps({"files": dict(sorted(files.items()))}, indent=1)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Files:
    """Raises ValueError, in words that follow a folder's name, when there is none to go by."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
        assert all(entry.keys() == {"bytes", "crc32"} for entry in files.values())
    except FileNotFoundError:
        raise ValueError(f"has no {MANIFEST_FILE}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"has a {MANIFEST_FILE} that cannot be read") from None
    return files


def share_of(files: Mapping[str, Mapping[str, Any]], rank: int, num_ranks: int) -> list[str]:
    """The files that `rank` looks at: each has one rank, and the ranks about as many bytes."""
    loads = [0] * num_ranks
    mine = []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        reader = loads.index(min(loads))
        loads[reader] += files[name]["bytes"]
        if reader == rank:
            mine.append(name)
    return mine


def look_at_files(folder: Path) -> tuple[Files, list[str], str]:
    """The manifest, which files are missing or of another size, and why they cannot be looked at.

    Nothing of content: see `wrong_checksums`. Trouble that may pass, a file system that fails for
    a while, is no damage.
    """
    try:
        files = read_manifest(folder)
        return files, [s for name in files if (s := _wrong_size(folder / name, files[name]))], ""
    except ValueError as error:
        return {}, [str(error)], ""
    except OSError as error:
        return {}, [], str(error)


def _wrong_size(path: Path, entry: Mapping[str, Any]) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    if size == entry["bytes"]:
        return ""
    return f"{path.name} has {size} bytes instead of {entry['bytes']}"


def wrong_checksums(folder: Path, files: Files, names: Sequence[str]) -> tuple[list[str], str]:
    """Which of `names`, all of them there, have other bytes; and why they cannot be read."""
    try:
        wrong = [name for name in names if _describe(folder / name) != files[name]]
    except OSError as error:
        return [], str(error)
    return [f"{name} has other bytes than were written" for name in wrong], ""


def _describe(path: Path) -> dict[str, Any]:
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}
