"""What each rank holds of the optimizer, as shards that every other layout can load.

Megatron's format that can be cut anew gathers the whole state of a model-parallel rank on each of
its data-parallel ranks, to save whole parameters: 12 bytes per parameter of host memory for each
rank, 4 of GPU memory, and as much read by each rank that resumes. A distributed optimizer holds a
range of a parameter's elements; here the range is saved as the few boxes that make it up, which
torch's loader puts together for any other layout. Nothing is gathered, every rank writes its own.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megasd.weights.boxes import boxes

_OfParameter = ShardedTensor | ShardedTensorFactory  # the latter makes tensors of a part each


def save_ranges_as_boxes(optimizer: ChainedOptimizer) -> None:
    """Replace what Megatron does for the format "fully_reshardable"."""
    for part in optimizer.chained_optimizers:
        assert isinstance(part, DistributedOptimizer)
        instance: Any = part
        instance.sharded_param_state_fully_reshardable = partial(_shards, part)
        instance.load_parameter_state_from_fully_reshardable = partial(_restore, part)


def _shards(
    part: DistributedOptimizer,
    model_shards: dict[str, Any],
    is_loading: bool = False,
    metadata: Any = None,
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """By number of the parameter on this rank: master weight and moments."""
    pieces = pieces_of(model_shards)
    state: dict[int, dict[str, list[ShardedTensor]]] = {}
    for number, (parameter, start, end) in enumerate(_ranges(part)):
        state[number] = {}
        for name, tensor in part._get_main_param_and_optimizer_states(parameter).items():
            values = torch.empty(end - start, dtype=tensor.dtype) if is_loading else tensor
            state[number][name] = [
                shard
                for piece, at in pieces[id(parameter)]
                for shard in cut(piece, at, values, start, f"optimizer.state.{name}.{piece.key}")
            ]
    return state


def _restore(part: DistributedOptimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    for number, (parameter, _, _) in enumerate(_ranges(part)):
        part._set_main_param_and_optimizer_states(
            parameter,
            {
                name: torch.cat([shard.flatten() for shard in shards])
                for name, shards in state[number].items()
            },
        )


def _ranges(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Which elements of which parameters this rank has the optimizer of."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def pieces_of(model_shards: dict[str, Any]) -> dict[int, list[tuple[ShardedTensor, int]]]:
    """By id of the parameter, the tensors of a checkpoint that it consists of, and where in it
    each begins."""
    return {
        id(base.data): _pieces(base)
        for base in nested_values(model_shards)
        if isinstance(base, _OfParameter)
    }


def _pieces(base: _OfParameter) -> list[tuple[ShardedTensor, int]]:
    if isinstance(base, ShardedTensor):
        return [(base, 0)]
    begin = base.data.storage_offset()
    return [(piece, piece.data.storage_offset() - begin) for piece in nested_values(base.build())]


def cut(
    piece: ShardedTensor, at: int, values: torch.Tensor, start: int, key: str
) -> Iterator[ShardedTensor]:
    """What of `piece`, which begins at element `at` of its parameter, lies in `values`, which
    begin at element `start`; in a checkpoint under `key`."""
    assert piece.data is not None
    assert piece.data.is_contiguous()
    assert isinstance(piece.replica_id, tuple), "of pipeline, tensor and data parallelism"
    low = max(start, at)
    high = min(start + len(values), at + piece.data.numel())
    lead = piece.prepend_axis_num
    for offset, size in boxes(piece.local_shape, low - at, high - at):
        count, shape = prod(size), (*(1 for _ in range(lead)), *size)
        inside = (*(0 for _ in range(lead)), *offset)
        yield ShardedTensor(
            key=key,
            data=values[low - start : low - start + count].view(shape),
            dtype=values.dtype,
            local_shape=shape,
            global_shape=piece.global_shape,
            global_offset=tuple(o + i for o, i in zip(piece.global_offset, inside, strict=True)),
            axis_fragmentations=None,  # boxes are on no grid
            replica_id=(*piece.replica_id[:-1], 0),  # data-parallel ranks hold different ranges
            allow_shape_mismatch=piece.allow_shape_mismatch,
        )
        low += count
