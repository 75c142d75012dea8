"""Who runs a run, what is left of it, and what is said when it ends."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megasd.checkpoint.checkpoints import saved_steps
from megasd.configuration.load import Config
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.metrics.run_folder import OWNER_FILE, Finished, note_finished, read_finished
from megasd.process import interrupt, lock, together
from megasd.process.errors import TryAgainError, may_pass

Result = TypeVar("Result")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The run is this process group's until then. Raises TryAgainError, on every rank: not now."""

    def take() -> None:
        nonlocal held
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.take(folder / OWNER_FILE)
        except lock.HeldError as holder:
            raise TryAgainError(
                f"{folder} is being run by {holder}; wait for its end, or stop it. "
                "Nothing is changed"
            ) from None

    held = None
    on_first_rank(take, about=folder)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def on_first_rank(work: Callable[[], Result], *, about: Path) -> Result:
    """What it returns there, or raises for a user to read, on every rank."""
    outcome: tuple[Result | None, Exception | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (work(), None)
        except OSError as error:
            kind = TryAgainError if may_pass(error) else ValueError
            outcome = (None, kind(f"{about} cannot be used ({error}); mend that, start again"))
        except (ValueError, TryAgainError) as error:
            outcome = (None, error)
    result, failure = together.from_first_rank(outcome)
    if isinstance(failure, TryAgainError):
        failure.on_every_rank = True
    if failure is not None:
        raise failure
    return result  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a run has still to do."""

    steps: bool = True
    evaluation: bool  # of the last weights
    export: bool

    @property
    def anything(self) -> bool:
        return self.steps or self.evaluation or self.export


def everything(config: Config) -> Left:
    return Left(evaluation=bool(config.evaluation.files), export=config.checkpoint.export_hf)


def left_of(config: Config, folder: Path) -> Left:
    """Of a run that is resumed, by what its folder holds."""
    steps, done = config.run.steps, max(saved_steps(folder / "checkpoints"), default=0)
    if done > steps:
        raise ValueError(f"run.steps: {folder} has done {done} steps already; give {done} or more")
    wanted = everything(config)
    if done < steps:
        return wanted
    finished = read_finished(folder)
    if finished.steps != steps:
        return replace(wanted, steps=False)
    is_measured = finished.evaluation == _measured_by(config) and any(
        row["step"] == steps for row in read_rows(folder / METRICS_FILE)
    )
    is_exported = finished.exported and (folder / "hf").is_dir()
    return Left(
        steps=False,
        evaluation=wanted.evaluation and not is_measured,
        export=wanted.export and not is_exported,
    )


def _measured_by(config: Config) -> object:
    """As it comes back from a file."""
    return json.loads(json.dumps(asdict(config.evaluation))) if config.evaluation.files else None


def note_end(config: Config, folder: Path, *, exported: bool) -> None:
    """That the steps are done and the evaluation is; called by all ranks."""
    if dist.get_rank() == 0:
        note_finished(
            folder,
            Finished(steps=config.run.steps, evaluation=_measured_by(config), exported=exported),
        )


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"megasd: {sentence}", flush=True)


def say_stopped(config: Config, folder: Path, saved_step: int) -> None:
    """Called by all ranks."""
    asked = interrupt.asked_anywhere()
    assert asked is not None, "somebody asked"
    if dist.get_rank() == 0:
        saved = f"saved after step {saved_step} of {config.run.steps}"
        if saved_step == 0:
            saved = "before its first step, with nothing to save"
        _say(f"stopped by {asked.name}, {saved}; go on with `megasd train --resume {folder}`")


def say_done(config: Config, folder: Path, *, was_before: bool) -> None:
    """Called by all ranks."""
    model = f"`megasd export {folder} --to FOLDER` writes its model"
    if config.checkpoint.export_hf:
        model = f"its model is in {folder / 'hf'}"
    if dist.get_rank() == 0:
        _say(
            f"{folder} is done{' already' * was_before}, {config.run.steps} steps; {model}; "
            f"`megasd train --resume {folder} run.steps=N` trains on to step N"
        )
