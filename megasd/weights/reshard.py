"""From Megatron shards to full Hugging Face tensors on every rank of a model-parallel group.

The plan is computed once. Execution walks it in one order that is the same on every rank: for each
bucket the owning pipeline stage gathers over tensor parallelism, then broadcasts to the other
stages. Extra memory is one bucket and the full tensors of one parameter; while gloo gathers, it
copies the bucket once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.weights.layout import layout_errors, local_shape, merge, stage_layers
from megasd.weights.tables.table import Row, Table

DEFAULT_BUCKET_BYTES = 512 * 2**20

# torch 2.13 renamed it and warns about the old name; 2.11 has the old name only.
if hasattr(dist, "all_gather_single"):
    all_gather_single = dist.all_gather_single
else:
    all_gather_single = dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Item:
    """One Megatron parameter of the whole model and the stage that holds it."""

    row: Row
    layer: int | None  # within the model
    stage: int
    local_names: tuple[str, ...]  # its possible names on that stage
    local_shape: tuple[int, ...]

    @property
    def local_size(self) -> int:
        return torch.Size(self.local_shape).numel()


class ReshardPlan:
    """Order and owner of every exported parameter.

    `bucket_bytes` bounds the full (gathered) bytes of a bucket; a larger parameter is alone.
    """

    def __init__(
        self,
        table: Table,
        tp_size: int,
        pp_size: int,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        if errors := layout_errors(table, tp_size, pp_size):
            raise ValueError("; ".join(errors))
        self.table = table
        self.tp_size = tp_size
        self.pp_size = pp_size
        self.bucket_bytes = bucket_bytes
        self.items = tuple(
            chain(
                (self._item(row, None, 0, 0) for row in table.first),
                (
                    self._item(row, layer, stage, stage_layers(table.num_layers, stage, pp_size)[0])
                    for stage in range(pp_size)
                    for layer in stage_layers(table.num_layers, stage, pp_size)
                    for row in table.layers
                ),
                (self._item(row, None, pp_size - 1, 0) for row in table.last if row.exported),
            )
        )

    def _item(self, row: Row, layer: int | None, stage: int, first_layer: int) -> Item:
        local = None if layer is None else layer - first_layer
        names = tuple(name.format(layer=local) for name in row.megatron)
        return Item(row, layer, stage, names, local_shape(row, self.tp_size))

    def buckets(self, element_bytes: int) -> Iterator[list[Item]]:
        """Runs of items of one stage that fit in `bucket_bytes` together."""
        bucket: list[Item] = []
        room = 0
        for item in self.items:
            full_bytes = item.local_size * self.tp_size * element_bytes
            if bucket and (full_bytes > room or item.stage != bucket[0].stage):
                yield bucket
                bucket = []
            if not bucket:
                room = self.bucket_bytes
            bucket.append(item)
            room -= full_bytes
        yield bucket

    def locate(self, local_parameters: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """The stage's tensors by the first of their `local_names`.

        Missing, unknown and wrongly shaped ones are errors.
        """
        found: dict[str, Tensor] = {}
        known = {name for row in self.table.last if not row.exported for name in row.megatron}
        errors = []
        for item in self.items:
            if item.stage != stage:
                continue
            known.update(item.local_names)
            names = [name for name in item.local_names if name in local_parameters]
            if len(names) != 1:
                errors.append(f"{item.local_names[0]} is there {len(names)} times instead of once")
                continue
            parameter = local_parameters[names[0]]
            found[item.local_names[0]] = parameter
            if parameter.shape != item.local_shape:
                shape = tuple(parameter.shape)
                errors.append(f"{names[0]} has shape {shape} instead of {item.local_shape}")
        errors += [f"{name} is unknown" for name in local_parameters if name not in known]
        if errors:
            raise ValueError(f"pipeline stage {stage}: " + "; ".join(errors))
        return found


def full_tensors(
    plan: ReshardPlan,
    local_parameters: Mapping[str, Tensor],
    *,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
    tp_rank: int,
    pp_rank: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every (Hugging Face name, full tensor) on every rank, in the order of the model.

    Collective over tp_group x pp_group, in which this rank is number tp_rank and pp_rank: all ranks
    must walk it to the end. A group of size 1 may be None. `local_parameters` are keyed by the
    rank's own Megatron names (layer 0 is the stage's first). The tensors have `dtype` (None: the
    parameters' own, which must be one), lie on the parameters' device and are the caller's to keep.
    Raises ValueError for a parameter that is missing, unknown or of the wrong shape.
    """
    local = plan.locate(local_parameters, pp_rank)
    own_dtypes = {parameter.dtype for parameter in local.values()}
    if dtype is None:
        if len(own_dtypes) > 1:
            raise ValueError(f"parameters of several dtypes {own_dtypes}: pass the one to send")
        (dtype,) = own_dtypes
    device = next(iter(local.values())).device

    groups = (tp_group, pp_group)
    for bucket in plan.buckets(dtype.itemsize):
        own = None
        if bucket[0].stage == pp_rank:
            own = [local[item.local_names[0]] for item in bucket]
        yield from _merged(bucket, _gathered(plan, bucket, own, groups, tp_rank, dtype, device))


def _gathered(
    plan: ReshardPlan,
    bucket: list[Item],
    own: list[Tensor] | None,
    groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None],
    tp_rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The bucket of all ranks, [tp_size, local elements]. `own`: None on the other stages."""
    sizes = [item.local_size for item in bucket]
    buffer = torch.empty((plan.tp_size, sum(sizes)), dtype=dtype, device=device)
    tp_group, pp_group = groups
    if own is not None:
        for parameter, part in zip(own, buffer[tp_rank].split(sizes), strict=True):
            part.view(parameter.shape).copy_(parameter.detach())
        if plan.tp_size > 1:  # in place: a rank's own part already lies where it belongs
            all_gather_single(buffer.view(-1), buffer[tp_rank], group=tp_group)
    if plan.pp_size > 1:
        dist.broadcast(buffer, group=pp_group, group_src=bucket[0].stage)
    return buffer


def _merged(bucket: list[Item], buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    sizes = [item.local_size for item in bucket]
    for item, parts in zip(bucket, buffer.split(sizes, dim=1), strict=True):
        shards = [part.view(item.local_shape) for part in parts]
        yield from merge(item.row, item.layer, shards).items()
