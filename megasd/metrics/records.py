"""The run's records: metrics.jsonl always, the console and wandb as configured.

Row s holds what step s measured and, when it was due, the held-out evaluation of the weights
before that step; the row after the last step, numbered like the run's length, holds only an
evaluation. What belongs to one start of a process lives under "time/", "speed/" and "engine/": all
other metrics repeat to the bit.
"""

import contextlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megasd.metrics.config import MetricsConfig
from megasd.metrics.console import Console
from megasd.process.durable import append_durably, write_durably
from megasd.process.errors import TryAgainError

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """`log(step, values)` once per step, on every rank; rank 0 writes. A context manager.

    Starting at `first_step` drops the rows from it on: a killed run may have logged steps that
    its last checkpoint does not know.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_folder: Path,
        *,
        total_steps: int,
        rank: int,
        run_config: Mapping[str, Any],
        first_step: int = 0,
    ) -> None:
        self._writes = rank == 0
        self._console: Console | None = None
        self._wandb: Any = None
        if not self._writes:
            return
        self._path = run_folder / METRICS_FILE
        with _trouble_with(self._path):
            drop_rows_from(self._path, first_step)
        self._wandb = _start_wandb(config, run_folder, run_config)
        if config.console:
            self._console = Console(run_folder.name, first_step=first_step, total_steps=total_steps)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._writes:
            return
        if self._console is not None:
            self._console.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row, keys sorted; what is not finite is null.

        On the disk before it returns: a checkpoint that counts the step comes later. Raises
        TryAgainError when the disk is full; then nothing of the row is there.
        """
        if not self._writes:
            return
        numbers = {name: float(value) for name, value in values.items()}
        row = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with _trouble_with(self._path):
            append_durably(self._path, json.dumps({"step": step, **row}, sort_keys=True) + "\n")
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._console is not None:
            self._console.show(step, numbers)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line without its end was cut by a kill: left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not a JSON row ({error}); restore the line or remove it"
            ) from error
    return rows


def drop_rows_from(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl without the rows of `step` and later; a kill leaves old or new."""
    if not path.exists():
        return
    kept = [json.dumps(row, sort_keys=True) + "\n" for row in read_rows(path) if row["step"] < step]
    write_durably(path, "".join(kept))


@contextlib.contextmanager
def _trouble_with(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TryAgainError(
            f"{path} cannot be written ({error.strerror}); make room, then continue with --resume"
        ) from error


def _start_wandb(config: MetricsConfig, run_folder: Path, run_config: Mapping[str, Any]) -> Any:
    """A wandb run, None when off. What cannot go online is recorded offline, with a warning."""
    if config.wandb == "off":
        return None
    import wandb  # a second of import time

    mode = config.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    # The id outlives the process: a resumed run continues its curves.
    id_file = run_folder / "wandb_id"
    if not id_file.exists():
        write_durably(id_file, secrets.token_hex(4))
    arguments = {
        "project": config.wandb_project,
        "name": run_folder.name,
        "id": id_file.read_text().strip(),
        "resume": "allow",
        "dir": str(run_folder),
        "config": dict(run_config),
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    if mode == "online":
        try:
            return wandb.init(mode="online", **arguments)
        except wandb.Error as error:
            warnings.warn(
                f"metrics.wandb: cannot go online ({error}); this run is recorded in "
                f"{run_folder}/wandb, send it later with `wandb sync`",
                stacklevel=2,
            )
    return wandb.init(mode="offline", **{**arguments, "resume": None})
