"""The weights where Megatron keeps them: in flat buckets, which data-parallel ranks share out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A flat tensor of which parameters are views, with gaps and filling between and behind them.

    Every rank of `group` has it whole; the optimizer's state of a slice is on one of them.
    """

    data: Tensor
    parameters: Mapping[str, tuple[torch.nn.Parameter, int]]  # and where it begins
    group: dist.ProcessGroup | None  # None: of this rank alone

    @property
    def own(self) -> slice:
        """This rank's slice: they are equal, in the order of the ranks."""
        if self.group is None:
            return slice(0, len(self.data))
        size = len(self.data) // dist.get_world_size(self.group)
        rank = dist.get_rank(self.group)
        return slice(rank * size, (rank + 1) * size)

    def views(self, data: Tensor) -> Iterator[tuple[str, torch.nn.Parameter, Tensor]]:
        """What the parameters would be, were they views of `data`."""
        for name, (parameter, start) in self.parameters.items():
            yield name, parameter, data[start : start + parameter.numel()].view(parameter.shape)

    def own_ranges(self) -> Iterator[tuple[str, int, int, int]]:
        """Name of a parameter, the range of its elements that is in this rank's slice, and where
        in the slice that begins."""
        own = self.own
        for name, (parameter, start) in self.parameters.items():
            low, high = max(start, own.start), min(start + parameter.numel(), own.stop)
            if low < high:
                yield name, low - start, high - start, low - own.start

    def gather(self, share: Tensor) -> Tensor:
        """Of every rank's share of its slice, all of it in the dtype of the weights; collective."""
        data = torch.empty_like(self.data)
        own = data[self.own]
        own.copy_(share)
        if self.group is not None:
            dist.all_gather_into_tensor(data, own, group=self.group)
        return data


def buckets_of(ddp: "DistributedDataParallel") -> list[Bucket]:
    """All weights that learn, dense ones and experts."""
    wrapped: Any = ddp  # its `buffers` are no longer torch's
    names = {parameter: name for name, parameter in wrapped.module.named_parameters()}
    found = []
    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            starts = {p: buffer.param_index_map[p][0] - bucket.offset for p in bucket.params_list}
            found.append(
                Bucket(
                    data=bucket.param_data,
                    parameters={names[p]: (p, start) for p, start in starts.items()},
                    group=group if group.size() > 1 else None,
                )
            )
    return found
