"""Checkpoints of a run: one folder each, complete or not there.

RUN/checkpoints/step_000050/ is written under another name, forced to disk, and renamed: a folder
that bears its name is whole, whenever the run was killed. Older ones go only after that.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megasd.checkpoint.config import CheckpointConfig
from megasd.checkpoint.model_state import (
    check_same_run,
    reseed,
    restore_state,
    sharded_state,
)
from megasd.data.prompts import Prompts
from megasd.policy.policy import Policy

_PREFIX = "step_"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints under RUN/checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name.removeprefix(_PREFIX)) for path in folder.glob(f"{_PREFIX}*[0-9]"))


def newest(folder: Path) -> Path | None:
    """The last complete checkpoint under RUN/checkpoints."""
    steps = saved_steps(folder)
    return folder / f"{_PREFIX}{steps[-1]:06d}" if steps else None


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

    def restore(self) -> None:
        """Continue from the newest checkpoint, in whatever layout; without one, from the start.

        Random states are of ranks: another number of ranks starts new ones from the run's seed.
        Nothing of ours draws from them; what is sampled has seeds of its own.
        """
        folder = newest(self.folder)
        if folder is None:
            return
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
        """After step `step` (from 0): every k steps and at the end."""
        done = step + 1
        if last or (self.config.every and done % self.config.every == 0):
            self.save(done)

    def save(self, next_step: int) -> None:
        """Raises SaveError, on every rank, when the disk is full; older checkpoints stay good."""
        partial = self.folder / f"partial_{next_step:06d}"
        final = self.folder / f"{_PREFIX}{next_step:06d}"
        is_first = dist.get_rank() == 0
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        failure = None
        try:
            dist_checkpointing.save(
                {
                    **sharded_state(self.policy, loading=False),
                    "prompts": self.prompts.state_dict(),
                    "memory": {name: value.cpu() for name, value in self.memory.items()},
                    "next_step": next_step,
                },
                str(partial),
            )
            if is_first:  # all ranks have written: the save ends with a collective
                _force_to_disk(partial)
        except CheckpointException as error:  # no Exception: torch derives it from BaseException
            failure = "; ".join(_in_words(cause) for cause, _ in error.failures.values())
        except Exception as error:
            failure = _in_words(error)
        self._raise_together(failure, partial, final)
        if is_first:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for step in saved_steps(self.folder)[: -self.config.keep]:
                shutil.rmtree(self.folder / f"{_PREFIX}{step:06d}")
        dist.barrier()

    def _raise_together(self, failure: str | None, partial: Path, final: Path) -> None:
        everywhere: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, failure)
        failures = [f"rank {rank}: {f}" for rank, f in enumerate(everywhere) if f is not None]
        if not failures:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        newest = saved_steps(self.folder)
        raise SaveError(
            f"{final} could not be written ({'; '.join(failures)}); {free / 2**20:.0f} MiB are "
            f"free there. Earlier checkpoints are untouched ({newest or 'none'}): make room, "
            "then continue with --resume"
        )


def _in_words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _force_to_disk(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
