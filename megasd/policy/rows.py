"""Rows of numbers that stay with the ranks that read a token: kept by one pass, read by others.

The tensor-parallel ranks of a replica read the same tokens. Each keeps its share of every row's
columns, and whoever reads rows puts the shares together, one micro-batch at a time.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from megasd.types import ResponseBatch, Support, TeacherHidden

Group = dist.ProcessGroup | None  # of tensor parallelism; None: of this rank alone


class KeptRows:
    """This rank's columns of rows that come a few at a time; how many come is known before."""

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        last: float,  # of the one row more, which stands for every token that has none
        dtype: torch.dtype,
        device: torch.device,
        group: Group,
    ) -> None:
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        share = -(-width // size)
        self._own = slice(min(rank * share, width), min((rank + 1) * share, width))
        self.values = torch.empty(num_rows + 1, share, dtype=dtype, device=device)
        if self._own.stop - self._own.start < share:
            self.values.zero_()  # filled up, and never looked at
        self.values[-1] = last
        self._filled = 0

    def add(self, rows: Shaped[Tensor, "n width"]) -> None:
        own = rows[:, self._own]
        self.values[self._filled : self._filled + len(own), : own.shape[1]] = own
        self._filled += len(own)


def whole(values: Shaped[Tensor, "n share"], width: int, group: Group) -> Shaped[Tensor, "n width"]:
    """The rows of which each rank of the group has some columns; a collective of the group."""
    if group is None:
        return values
    if not len(values):
        return values.new_empty(0, width)
    shares = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather_into_tensor(shares.flatten(0, 1), values.contiguous(), group=group)
    return shares.transpose(0, 1).flatten(1)[:, :width]


def whole_support(support: Support, group: Group) -> Support:
    """With all K ids of each of its tokens."""
    size = support.num_ids
    if size is None:
        return support
    logprobs = support.teacher_logprobs
    return Support(
        ids=whole(support.ids, size, group),
        teacher_logprobs=None if logprobs is None else whole(logprobs, size, group),
        index=support.index,
    )


def whole_rows(part: ResponseBatch, group: Group) -> ResponseBatch:
    """A micro-batch with the whole rows of its tokens; the ranks of the group have the same one."""
    support, hidden = part.support, part.teacher_hidden
    if support is not None:
        support = whole_support(support, group)
    if hidden is not None:
        size = hidden.weight.shape[1]
        hidden = TeacherHidden(hidden=whole(hidden.hidden, size, group), weight=hidden.weight)
    return replace(part, support=support, teacher_hidden=hidden)
