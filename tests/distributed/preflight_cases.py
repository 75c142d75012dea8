"""What ranks run for the tests of the preflight: four nodes of one rank, one of them bad."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasd.doctor import machine, preflight
from megasd.doctor.machine import GPU, Facts, Finding

GOOD = GPU("NVIDIA H200", "580.1", 143771, 5, 1980, "Enabled", 0, False)
VERSIONS = {"torch": "2.11.0", "megatron-core": "0.16.1"}


def examine(
    folder: str,
    *,
    bad_rank: int,
    gpu: GPU = GOOD,
    versions: dict[str, str | None] | None = None,
    bad_folder: str | None = None,
    slow: float = 1.0,  # 0: its all-reduces fail
    ranks_per_node: int = 1,
    leaves: str | None = None,  # a file that the bad rank puts into the folder meanwhile
) -> list[Finding]:
    """The findings of this rank; `bad_rank` has what the other arguments say."""
    rank = dist.get_rank()
    own = Facts(
        rank=rank,
        host=f"node{rank // ranks_per_node}",
        gpus=(GOOD,) * 8,
        visible_gpus=8,
        versions=VERSIONS,
    )
    place = Path(folder)
    if rank == bad_rank:
        place = Path(bad_folder or folder)
        own = dataclasses.replace(
            own, gpus=(*[GOOD] * 7, gpu), versions={**VERSIONS, **(versions or {})}
        )

    def check_folder(folder: Path) -> list[Finding]:
        if leaves is not None and rank == bad_rank:
            (folder / leaves).touch()
        return machine.check_folder(folder)

    def measure(group: Any, ranks: Sequence[int], device: torch.device) -> float:
        """A real all-reduce, and a speed that no other program of the machine changes."""
        if slow == 0 and bad_rank in ranks:
            raise RuntimeError("connection closed by peer")
        total = torch.ones(3, device=device)
        dist.all_reduce(total, group=group)
        assert total.tolist() == [len(ranks)] * 3
        speed = 300e9 if len(ranks) <= ranks_per_node else 45e9
        return speed * (slow if rank == bad_rank else 1.0)

    preflight.VISIBLE_SECONDS = 0.5
    preflight.check_folder = check_folder
    return preflight.preflight(own, place, torch.device("cpu"), measure=measure)
