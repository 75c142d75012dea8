"""Checkpoints of a run: one folder each, whole or not used.

RUN/checkpoints/step_000050/ is written under another name beside the training, forced to disk, and
renamed; only then older ones go. Whenever the run is killed, what bears its name was whole. What
happens to it later shows in its manifest: a resumed run checks every byte, and goes back to the
last checkpoint that is still what was written.
"""

import contextlib
import functools
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megasd.checkpoint.config import CheckpointConfig
from megasd.checkpoint.manifest import look_at_files, share_of, wrong_checksums
from megasd.checkpoint.model_state import (
    check_same_run,
    reseed,
    restore_state,
    sharded_state,
)
from megasd.checkpoint.writer import Shared, Writing, in_words, stage
from megasd.data.prompts import Prompts
from megasd.policy.policy import Policy
from megasd.process import together
from megasd.process.durable import force_to_disk
from megasd.process.errors import TryAgainError

MAX_FAILED_SAVES = 3  # in a row, before a run that cannot save stops
_PREFIX, _PARTIAL, _DAMAGED = "step_", "partial_", "damaged_"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints under RUN/checkpoints, oldest first."""
    return _steps(folder, _PREFIX)


def newest(folder: Path) -> Path | None:
    """The last checkpoint under RUN/checkpoints."""
    steps = saved_steps(folder)
    return _path(folder, _PREFIX, steps[-1]) if steps else None


class SaveError(TryAgainError):
    """A checkpoint could not be written; the message says why, and what is left."""


class Checkpoints:
    """Saves and restores policy, data position, the algorithm's memory and the step.

    Every method is called by all ranks.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run_folder: Path,
        policy: Policy,
        prompts: Prompts,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.folder = run_folder / "checkpoints"
        self.policy = policy
        self.prompts = prompts
        self.memory: dict[str, torch.Tensor] = {}  # the algorithm's, from step to step
        self.rows: list[str] = []  # of metrics.jsonl that could not be written yet, on rank 0
        self.next_step = 0  # the first step that is still to be done, when the process started
        self.saved_step = 0  # what a resumed run would go on from; at 0, from the start
        self._last_step = (0, prompts.state_dict())  # done so far, and where the prompts were then
        self._clock = clock
        self._begun = clock()  # the last save
        # Of the threads that write: they talk whenever they are done, not in the order of a step.
        self._group = together.patient_group()
        replicas: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._shared = Shared(dist.get_process_group_ranks(replicas))
        self._writing: tuple[int, Writing] | None = None
        self._is_validated = False  # the plan of a save: its shards do not change in a run
        self._failed_saves = 0  # in a row

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, in whatever layout; with none, from the start.

        A damaged one is put aside as damaged_000050, with a warning. Raises ValueError if there
        are only damaged ones, TryAgainError where files cannot be read. Random states are of
        ranks: another number of ranks starts new ones from the run's seed. Nothing of ours draws
        from them; what is sampled has its own seeds.
        """
        # A network file system may show ranks different folders for a while: the first one says.
        steps = together.from_first_rank(saved_steps(self.folder) if dist.get_rank() == 0 else None)
        whole, damaged = self._choose(steps)
        if steps and whole is None:
            found = ", and ".join(
                f"{_path(self.folder, _PREFIX, s)} {d}" for s, d in damaged.items()
            )
            raise ValueError(
                f"no checkpoint is whole: {found}; put a copy of one there, or start a new run"
            )
        if dist.get_rank() == 0:
            self._tidy(damaged)
        together.meet()
        if whole is not None:
            self._load(_path(self.folder, _PREFIX, whole))

    def _choose(self, steps: list[int]) -> tuple[int | None, dict[int, str]]:
        """The last whole checkpoint, and what is wrong with those behind it."""
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            found = self._damage(_path(self.folder, _PREFIX, step))
            if not found:
                return step, damaged
            damaged[step] = found
        return None, damaged

    def _damage(self, folder: Path) -> str:
        """What is not as it was written, the same on every rank; each rank reads a share."""
        found = None
        if dist.get_rank() == 0:
            found = look_at_files(folder)
        files, wrong, trouble = together.from_first_rank(found)
        if not wrong and not trouble:
            share = share_of(files, dist.get_rank(), dist.get_world_size())
            everywhere = together.from_every_rank(wrong_checksums(folder, files, share))
            wrong = [sentence for sentences, _ in everywhere for sentence in sentences]
            trouble = "; ".join(f"rank {i}: {t}" for i, (_, t) in enumerate(everywhere) if t)
        if trouble:  # no reason to give a checkpoint up
            raise TryAgainError(
                f"{folder} cannot be read ({trouble}); nothing is changed, try again"
            )
        return "; ".join(wrong)

    def _tidy(self, damaged: dict[int, str]) -> None:
        for step, sentence in damaged.items():
            folder, aside = (_path(self.folder, p, step) for p in (_PREFIX, _DAMAGED))
            _warn(
                f"{folder} {sentence}; it is put aside as {aside.name}, and the run goes on from "
                "the checkpoint before it"
            )
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):  # the next save of this step replaces it
                folder.rename(aside)
        for step in _steps(self.folder, _PARTIAL):  # of a process that was killed
            shutil.rmtree(_path(self.folder, _PARTIAL, step), ignore_errors=True)

    def _load(self, folder: Path) -> None:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        check_same_run(self.policy, common, str(folder))
        same_ranks = common["world_size"] == dist.get_world_size()
        state: Any = dist_checkpointing.load(
            {
                **sharded_state(self.policy, loading=True, random_states=same_ranks),
                "prompts": {},
                "memory": {},
                "next_step": 0,
            },
            str(folder),
        )
        restore_state(self.policy, state)
        self.prompts.load_state_dict(state["prompts"])
        device = self.policy.backend.device
        self.memory.update({k: v.to(device) for k, v in state["memory"].items()})
        self.rows[:] = state.get("rows", [])  # older checkpoints have none
        self.next_step = self.saved_step = state["next_step"]
        self._last_step = (self.next_step, state["prompts"])
        if not same_ranks:
            reseed(self.policy.seed, self.next_step, dist.get_rank())
            if dist.get_rank() == 0:
                print(
                    f"megasd: note: {folder} was saved by {common['world_size']} ranks, and "
                    f"{dist.get_world_size()} go on; their random states start anew from run.seed",
                    file=sys.stderr,
                )

    def save_if_due(self, step: int, *, last: bool) -> None:
        """After step `step` (from 0): when one is due, beside the next steps; at the end, at once.

        A save that failed is a warning, and tried again: raises SaveError, on every rank, where
        it failed MAX_FAILED_SAVES times in a row or was the last.
        """
        done = step + 1
        self._last_step = (done, self.prompts.state_dict())
        if last:
            return self.save(done)
        is_due = bool(self.config.every) and done % self.config.every == 0
        self._tolerate(self._settle(wait=is_due))
        if is_due or (self._writing is None and (self._failed_saves or self._is_time())):
            self._tolerate(self._begin(done))

    def _is_time(self) -> bool:
        """Whether the last save is too long ago, by the first rank's clock."""
        if self.config.minutes is None:
            return False
        return together.from_first_rank(self._clock() - self._begun >= 60 * self.config.minutes)

    def save_last_step(self) -> None:
        """Where the step after it is given up before it changed the policy; if it is not saved yet.

        Raises SaveError.
        """
        done, prompts = self._last_step
        if self._writing is not None and self._writing[0] == done:
            self._settle(wait=True)  # if that failed, once more
        if self.saved_step < done:
            self.prompts.load_state_dict(prompts)
            self.save(done)

    def save(self, next_step: int) -> None:
        """Write one and wait for it; raises SaveError, and older checkpoints stay good."""
        self._settle(wait=True)  # this one is newer, whatever became of that
        if failure := self._begin(next_step) or self._settle(wait=True):
            raise SaveError(f"{failure}, then continue with --resume", on_every_rank=True)

    def close(self) -> None:
        """Waits for a checkpoint that is being written while the run ends with an error."""
        if self._writing is not None:
            self._writing[1].wait(patiently=False)

    def _begin(self, next_step: int) -> str | None:
        """Plan and copy, and leave the rest to the threads; returns why that cannot be."""
        self._begun = self._clock()
        partial = _path(self.folder, _PARTIAL, next_step)
        failure = None
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                failure = in_words(error)
        if failure := together.from_first_rank(failure):
            return self._sentence(next_step, failure)
        state = {
            **sharded_state(self.policy, loading=False),
            "prompts": self.prompts.state_dict(),
            "memory": {name: value.cpu() for name, value in self.memory.items()},
            "rows": list(self.rows),
            "next_step": next_step,
        }
        is_cuda, validate = self.policy.backend.is_cuda, not self._is_validated
        staged = stage(state, partial, shared=self._shared, is_cuda=is_cuda, validate=validate)
        self._is_validated = True
        publish = functools.partial(self._publish, partial, next_step)
        self._writing = (next_step, Writing(staged, partial, self._group, publish))
        return None

    def _settle(self, *, wait: bool) -> str | None:
        """How the save under way ended, agreed on by all ranks; None: well, or not yet."""
        if self._writing is None:
            return None
        step, writing = self._writing
        if wait:
            writing.wait(patiently=True)
        said = together.from_every_rank((writing.is_done, writing.failure))
        if not all(is_done for is_done, _ in said):
            return None
        self._writing = None
        if failure := next((failure for _, failure in said if failure is not None), None):
            return self._sentence(step, failure)
        self._failed_saves, self.saved_step = 0, step
        return None

    def _tolerate(self, failure: str | None) -> None:
        if failure is None:
            return
        self._failed_saves += 1
        if self._failed_saves == MAX_FAILED_SAVES:
            raise SaveError(f"{failure}, then continue with --resume", on_every_rank=True)
        if dist.get_rank() == 0:
            _warn(f"{failure}; the run goes on, and tries again")

    def _sentence(self, step: int, failure: str) -> str:
        free = "an unknown number of"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.folder.parent).free / 2**20:.0f}"
        return (
            f"{_path(self.folder, _PREFIX, step)} could not be written ({failure}); the file "
            f"system has {free} MiB free. Earlier checkpoints are untouched "
            f"({saved_steps(self.folder) or 'none'}): make room"
        )

    def _publish(self, partial: Path, step: int) -> None:
        """On the first rank, when all is on the disk. With its name the checkpoint is there."""
        final = _path(self.folder, _PREFIX, step)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        force_to_disk(self.folder)
        old = [(_PREFIX, saved) for saved in saved_steps(self.folder)[: -self.config.keep]]
        old += [(_DAMAGED, damaged) for damaged in _steps(self.folder, _DAMAGED) if damaged <= step]
        for prefix, saved in old:
            # Under another name first: a kill leaves no half of a checkpoint behind.
            rest = _path(self.folder, _PARTIAL, saved)
            try:
                _path(self.folder, prefix, saved).rename(rest)
                shutil.rmtree(rest)
            except OSError as error:
                _warn(f"{_path(self.folder, prefix, saved)} cannot be removed: {in_words(error)}")


def _warn(sentence: str) -> None:
    print(f"megasd: warning: {sentence}", file=sys.stderr)


def _steps(folder: Path, prefix: str) -> list[int]:
    if not folder.is_dir():
        return []
    found = (re.fullmatch(rf"{prefix}(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _path(folder: Path, prefix: str, step: int) -> Path:
    return folder / f"{prefix}{step:06d}"
