"""The run's records: metrics.jsonl always, the console and wandb as configured. None ends a run.

Row s holds what step s measured and, when it was due, the held-out evaluation of the weights
before that step; the row after the last step, numbered like the run's length, holds only an
evaluation. What belongs to one start of a process lives under "time/", "speed/" and "engine/": all
other metrics repeat to the bit.

Console and wandb are dropped, with a warning, when they fail. Rows that metrics.jsonl does not take
are kept, in checkpoints too, and written as soon as it does.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megasd.metrics import wandb
from megasd.metrics.config import MetricsConfig
from megasd.metrics.console import Console
from megasd.process.durable import append_durably, write_durably
from megasd.process.errors import TryAgainError

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """`log(step, values)` once per step, on every rank; rank 0 writes. A context manager.

    The first row that is logged replaces those from `first_step` on: a killed run may have logged
    steps that its last checkpoint does not know. `unwritten` are the rows that are in no file yet;
    whoever saves a checkpoint puts them in it.
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
        unwritten: list[str] | None = None,
    ) -> None:
        self._writes = rank == 0
        self._console: Console | None = None
        self._wandb: Any = None
        self._unwritten = [] if unwritten is None else unwritten
        if not self._writes:
            return
        self._path = run_folder / METRICS_FILE
        read_rows(self._path)  # a broken one is told before any time is spent
        if self._unwritten:
            with _trouble_with(self._path):
                rewrite_rows(self._path, self._unwritten)
        self._unwritten.clear()
        self._is_behind = False
        self._replaces_from: int | None = first_step
        self._guard("metrics.wandb", lambda: self._start_wandb(config, run_folder, run_config))
        if config.console:
            self._console = Console(run_folder.name, first_step=first_step, total_steps=total_steps)
            if self._wandb is not None:
                self.say(f"wandb: {wandb.where(self._wandb)}")

    def _start_wandb(
        self, config: MetricsConfig, run_folder: Path, run_config: Mapping[str, Any]
    ) -> None:
        self._wandb = wandb.start(config, run_folder, run_config)

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
        if self._unwritten:
            self._write()
        if console := self._console:
            self._guard("metrics.console", console.close)
        if self._wandb is not None:
            code = 0 if kind is None else 1
            self._guard("metrics.wandb", lambda: self._wandb.finish(exit_code=code))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row, keys sorted; what is not finite is null.

        On the disk before it returns, or among the rows that a checkpoint takes along.
        """
        if not self._writes:
            return
        numbers = {name: float(value) for name, value in values.items()}
        row = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._unwritten.append(json.dumps({"step": step, **row}, sort_keys=True) + "\n")
        self._write()
        if self._wandb is not None:
            self._guard("metrics.wandb", lambda: self._wandb.log(numbers, step=step))
        if console := self._console:
            self._guard("metrics.console", lambda: console.show(step, numbers))

    def say(self, sentence: str) -> None:
        """A line of its own on the console."""
        if console := self._console:
            self._guard("metrics.console", lambda: console.say(sentence))

    def _write(self) -> None:
        """All rows that are in no file yet."""
        try:
            if self._replaces_from is None:
                append_durably(self._path, "".join(self._unwritten))
            else:
                rewrite_rows(self._path, self._unwritten, before=self._replaces_from)
        except OSError as error:
            if not self._is_behind:
                warnings.warn(
                    f"{self._path} cannot be written ({error.strerror}); make room: its rows are "
                    "kept, in checkpoints too, and written when that works again",
                    stacklevel=3,
                )
            self._is_behind = True
            return
        self._unwritten.clear()
        self._is_behind, self._replaces_from = False, None

    def _guard(self, name: str, act: Callable[[], Any]) -> None:
        """What fails is not asked again."""
        try:
            act()
        except Exception as error:
            warnings.warn(
                f"{name}: failed and is left out from here on, the run goes on: "
                f"{type(error).__name__}: {error}",
                stacklevel=3,
            )
            if name == "metrics.wandb":
                self._wandb = None
            elif self._console is not None:
                broken, self._console = self._console, None
                with contextlib.suppress(Exception):
                    broken.close()


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


def rewrite_rows(path: Path, lines: Sequence[str], *, before: int | None = None) -> None:
    """Adds them to metrics.jsonl, in order of steps; a kill leaves the old file or the new one.

    Of the rows in the file those from step `before` on are left out.
    """
    rows = {row["step"]: row for row in read_rows(path) if before is None or row["step"] < before}
    rows |= {row["step"]: row for row in map(json.loads, lines)}
    write_durably(path, "".join(json.dumps(rows[s], sort_keys=True) + "\n" for s in sorted(rows)))


@contextlib.contextmanager
def _trouble_with(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TryAgainError(
            f"{path} cannot be written ({error.strerror}); make room, then continue with --resume"
        ) from error
