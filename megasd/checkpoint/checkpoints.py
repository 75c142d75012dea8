"""Checkpoints of a run: one folder each, whole or not used.

RUN/checkpoints/step_000050/ is written under another name beside the training, forced to disk, and
renamed; only then older ones go. Whenever the run is killed, what bears its name was whole. What
happens to it later shows in its manifest: a resumed run checks every byte, and goes back to the
last checkpoint that is still what was written.
"""

import datetime
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megasd.checkpoint.config import CheckpointConfig
from megasd.checkpoint.manifest import damage, read_manifest, share_of
from megasd.checkpoint.model_state import (
    check_same_run,
    reseed,
    restore_state,
    sharded_state,
)
from megasd.checkpoint.writer import Writing, force_to_disk, in_words, stage
from megasd.data.prompts import Prompts
from megasd.policy.policy import Policy

MAX_FAILED_SAVES = 3  # in a row, before a run that cannot save stops
_PREFIX, _PARTIAL, _DAMAGED = "step_", "partial_", "damaged_"
_WRITING_LIMIT = datetime.timedelta(hours=2)  # for the slowest rank's files


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints under RUN/checkpoints, oldest first."""
    return _steps(folder, _PREFIX)


def newest(folder: Path) -> Path | None:
    """The last checkpoint under RUN/checkpoints."""
    steps = saved_steps(folder)
    return _path(folder, _PREFIX, steps[-1]) if steps else None


class SaveError(ValueError):
    """A checkpoint could not be written; the message says why, and what is left."""


class Checkpoints:
    """Saves and restores policy, data position, the algorithm's memory and the step.

    Every method is called by all ranks.
    """

    def __init__(
        self, config: CheckpointConfig, run_folder: Path, policy: Policy, prompts: Prompts
    ) -> None:
        self.config = config
        self.folder = run_folder / "checkpoints"
        self.policy = policy
        self.prompts = prompts
        self.memory: dict[str, torch.Tensor] = {}  # the algorithm's, from step to step
        self.next_step = 0  # the first step that is still to be done
        # Of the threads that write: they talk whenever they are done, not in the order of a step.
        group = dist.new_group(backend="gloo", timeout=_WRITING_LIMIT)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        self._group = group
        self._writing: tuple[int, Writing] | None = None
        self._failed_saves = 0  # in a row

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, in whatever layout; with none, from the start.

        A damaged one is put aside as damaged_000050, with a warning. Raises ValueError if there
        are only damaged ones. Random states are of ranks: another number of ranks starts new ones
        from the run's seed. Nothing of ours draws from them; what is sampled has its own seeds.
        """
        steps = saved_steps(self.folder)
        damaged = []
        for step in reversed(steps):
            folder = _path(self.folder, _PREFIX, step)
            found = self._damage(folder)
            if not found:
                break
            damaged.append(f"{folder} {'; '.join(found)}")
        else:
            if steps:
                raise ValueError(
                    f"no checkpoint is whole: {', and '.join(damaged)}; put a copy of one there, "
                    "or start a new run"
                )
        if dist.get_rank() == 0:
            self._tidy(steps[len(steps) - len(damaged) :], damaged)
        dist.barrier()
        if steps:
            self._load(_path(self.folder, _PREFIX, steps[len(steps) - len(damaged) - 1]))

    def _damage(self, folder: Path) -> list[str]:
        """What is not as it was written, the same on every rank; each rank reads a share."""
        found: list[str] = []
        try:
            files = read_manifest(folder)
            share = share_of(files, dist.get_rank(), dist.get_world_size())
            found = damage(folder, files, share)
        except ValueError as error:
            found = [str(error)]
        everywhere: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        return list(dict.fromkeys(sentence for found in everywhere for sentence in found))

    def _tidy(self, damaged_steps: list[int], sentences: list[str]) -> None:
        for step in damaged_steps:
            aside = _path(self.folder, _DAMAGED, step)
            shutil.rmtree(aside, ignore_errors=True)
            _path(self.folder, _PREFIX, step).rename(aside)
        for sentence in sentences:
            print(
                f"megasd: warning: {sentence}; it is put aside under {_DAMAGED}*, and the run goes "
                "on from the checkpoint before it",
                file=sys.stderr,
            )
        for step in _steps(self.folder, _PARTIAL):  # of a process that was killed
            shutil.rmtree(_path(self.folder, _PARTIAL, step))

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
        self.next_step = state["next_step"]
        if not same_ranks:
            reseed(self.policy.seed, self.next_step, dist.get_rank())
            if dist.get_rank() == 0:
                print(
                    f"megasd: note: {folder} was saved by {common['world_size']} ranks, and "
                    f"{dist.get_world_size()} go on; their random states start anew from run.seed",
                    file=sys.stderr,
                )

    def save_if_due(self, step: int, *, last: bool) -> None:
        """After step `step` (from 0): every k steps, beside the next ones; at the end, at once.

        A save that failed is repeated after the next step, and the run goes on: raises SaveError,
        on every rank, where it failed MAX_FAILED_SAVES times in a row or was the last.
        """
        done = step + 1
        self._settle(wait=False, must=False)
        is_due = self.config.every and done % self.config.every == 0
        if last:
            self.save(done)
        elif is_due or (self._failed_saves and self._writing is None):
            self._begin(done, must=False)

    def save(self, next_step: int) -> None:
        """Write one and wait for it; raises SaveError, and older checkpoints stay good."""
        self._begin(next_step, must=True)
        self._settle(wait=True, must=True)

    def close(self) -> None:
        """Waits for a checkpoint that is being written, also when the run has failed."""
        if self._writing is not None:
            self._writing[1].wait()

    def _begin(self, next_step: int, *, must: bool) -> None:
        """Plan and copy, and leave the rest to the threads; waits for a save that is under way."""
        self._settle(wait=True, must=False)
        partial = _path(self.folder, _PARTIAL, next_step)
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                failure = [in_words(error)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            return self._failed(next_step, failure[0], must=must)
        state = {
            **sharded_state(self.policy, loading=False),
            "prompts": self.prompts.state_dict(),
            "memory": {name: value.cpu() for name, value in self.memory.items()},
            "next_step": next_step,
        }
        staged = stage(state, partial, is_cuda=self.policy.backend.is_cuda)
        publish = lambda: self._publish(partial, next_step)  # noqa: E731
        self._writing = (next_step, Writing(staged, partial, self._group, publish))

    def _settle(self, *, wait: bool, must: bool) -> None:
        """Learn, on all ranks together, how the save under way ended; `must`: a failure raises."""
        if self._writing is None:
            return
        step, writing = self._writing
        if wait:
            writing.wait()
        elif not self._is_done_everywhere(writing):
            return
        self._writing = None
        if writing.failure is not None:
            self._failed(step, writing.failure, must=must)
        else:
            self._failed_saves = 0

    def _is_done_everywhere(self, writing: Writing) -> bool:
        done = torch.tensor(int(writing.is_done), device=self.policy.backend.device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done)

    def _publish(self, partial: Path, step: int) -> None:
        """On the first rank, when all is on the disk."""
        final = _path(self.folder, _PREFIX, step)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        force_to_disk(self.folder)
        old = [(_PREFIX, saved) for saved in saved_steps(self.folder)[: -self.config.keep]]
        old += [(_DAMAGED, damaged) for damaged in _steps(self.folder, _DAMAGED) if damaged <= step]
        for prefix, saved in old:
            # Under another name first: a kill leaves no half of a checkpoint behind.
            rest = _path(self.folder, _PARTIAL, saved)
            _path(self.folder, prefix, saved).rename(rest)
            shutil.rmtree(rest, ignore_errors=True)

    def _failed(self, step: int, failure: str, *, must: bool) -> None:
        self._failed_saves += 1
        must = must or self._failed_saves == MAX_FAILED_SAVES
        free: list[int] = [0]
        if dist.get_rank() == 0:
            shutil.rmtree(_path(self.folder, _PARTIAL, step), ignore_errors=True)
            free = [shutil.disk_usage(self.folder.parent).free]
        dist.broadcast_object_list(free, src=0)
        sentence = (
            f"{_path(self.folder, _PREFIX, step)} could not be written ({failure}); "
            f"{free[0] / 2**20:.0f} MiB are free there. Earlier checkpoints are untouched "
            f"({saved_steps(self.folder) or 'none'}): make room"
        )
        if must:
            raise SaveError(f"{sentence}, then continue with --resume")
        if dist.get_rank() == 0:
            print(
                f"megasd: warning: {sentence}; the run goes on, and saves after the next step",
                file=sys.stderr,
            )


def _steps(folder: Path, prefix: str) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name.removeprefix(prefix)) for path in folder.glob(f"{prefix}*[0-9]"))


def _path(folder: Path, prefix: str, step: int) -> Path:
    return folder / f"{prefix}{step:06d}"
