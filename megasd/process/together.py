"""What ranks tell each other while one of them may work for hours before it speaks.

Objects travel here and nowhere else (tests/unit/process/test_together.py holds it): over gloo,
also beside NCCL, whose deadline would end the run and whose buffers would lie on the GPU. A rank
that dies ends the wait at once; one that hangs is the watchdog's business (loop/watchdog.py).
"""

import resource
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(days=365)  # no deadline: gloo wants a number
_made: "tuple[weakref.ref[Any], weakref.ref[Any]] | None" = None  # default group, ours beside it


def from_every_rank(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank of the group (None: all) says, by rank. Called by all of them."""
    group = _all_ranks() if group is None else group
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_speakers(value: Any, speakers: Sequence[int]) -> list[Any]:
    """What these ranks say, in their order, to all. Called by all ranks, who know who speaks.

    For much of it: `from_every_rank` makes room on each rank for as many of the longest as there
    are ranks.
    """
    said: list[Any] = []
    for rank in speakers:
        values = [value if dist.get_rank() == rank else None]
        dist.broadcast_object_list(values, src=rank, group=_all_ranks())
        said += values
    return said


def to_first_rank(value: Any, group: dist.ProcessGroup) -> list[Any] | None:
    """What each rank says, by rank, on rank 0. Called by all ranks."""
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values


def from_first_rank(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """What rank 0 says. Called by all ranks."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_all_ranks() if group is None else group)
    return values[0]


def meet() -> None:
    """Returns when all ranks have come."""
    dist.barrier(group=_all_ranks())


def patient_group(ranks: Sequence[int] | None = None) -> Any:
    """A group of its own for `ranks` (None: all), made by all ranks in one order."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # every rank of a group holds a connection to each of the others
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    group = dist.new_group(ranks, backend="gloo")  # whoever does not join in time is missed
    if isinstance(group, dist.ProcessGroup):  # this rank is a member
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)
    return group


def _all_ranks() -> dist.ProcessGroup:
    """Made at its first use, which all ranks reach together; it ends with the default group."""
    global _made
    world = dist.group.WORLD
    if _made is not None and _made[0]() is world and (group := _made[1]()) is not None:
        return group
    group = patient_group()
    _made = weakref.ref(world), weakref.ref(group)
    return group
