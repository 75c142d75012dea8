"""The run folder: what is needed to say, later, what was run."""

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import megasd
from megasd.process.durable import write_durably

CONFIG_FILE = "config.yaml"
OWNER_FILE = "owner"  # locked by the process that runs it, which it names
_FINISHED_FILE = "finished.json"
PACKAGES = (
    "megasd",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "vllm",
    "numpy",
    "datasets",
    "math-verify",
    "reasoning-gym",
)


def create_run_folder(folder: Path, *, config: str, seed: int, command: Sequence[str]) -> Path:
    """Makes `folder` with config.yaml (`config`, resolved), versions.json, git.json and run.json.

    Raises ValueError if the folder holds a run already: its records would be mixed with new ones.
    """
    if holds_a_run(folder):
        raise ValueError(
            f"run.name: {folder} already holds a run; choose another run.name, remove the folder, "
            f"or continue that run with `megasd train --resume {folder}`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "versions.json", versions())
    _write(folder / "git.json", git_state(Path(megasd.__file__).parent))
    _write(folder / "run.json", {"seed": seed, "command": list(command)})
    # Last and whole: its presence says that the folder is a run.
    write_durably(folder / CONFIG_FILE, config)
    return folder


def holds_a_run(folder: Path) -> bool:
    """A run that has done something; one that was stopped before its first step gives way."""
    rows = folder / "metrics.jsonl"
    has_rows = rows.exists() and rows.stat().st_size > 0
    return (folder / CONFIG_FILE).exists() and (has_rows or any(folder.glob("checkpoints/*")))


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How far a run has come with what follows its last step: RUN/finished.json."""

    steps: int  # that it has trained
    evaluation: Any = None  # the config section that its last row was measured by; null: none was
    exported: bool = False


def note_finished(folder: Path, finished: Finished) -> None:
    write_durably(folder / _FINISHED_FILE, json.dumps(asdict(finished), indent=2) + "\n")


def read_finished(folder: Path) -> Finished:
    """That of no steps where the run has not come to an end, or did so without this file."""
    try:
        return Finished(**json.loads((folder / _FINISHED_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Finished(steps=0)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Python's and the packages' versions; null: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(package: Path) -> dict[str, Any] | None:
    """Commit of the code in `package`, and whether it was changed; None: it is in no checkout."""
    # An installed copy may lie inside the checkout of something else: ask for our own file.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git printed; None if it failed or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
