"""Bytes of weights, gradients and optimizer state of a rank: exactly what Megatron allocates.

policy/megatron/build.py wraps the model in buffers: the dense parameters in one, those of experts
in another, parameters in the model's dtype and gradients in float32. A buffer lays its parameters
in reverse order, each from a multiple of 64 elements on, and is filled up to a multiple of
lcm(data-parallel ranks, 128); an embedding that is tied across stages has a bucket of its own.
Left out: on the first stage Megatron fills up every 40 million parameters, for buckets that are
reduced beside the backward pass, with less than that multiple each.
Each data-parallel rank keeps the optimizer's state of an equal slice of every bucket: AdamW's two
moments, and a float32 copy of the parameters where the model is in bfloat16.

The order is that of Megatron's local layer spec. It only matters where sizes are no multiples of
64, which those of published models all are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megasd.planner.model import Model
from megasd.policy.config import ParallelConfig
from megasd.weights.layout import Sizes, local_shape, rank_experts, stage_layers
from megasd.weights.tables.table import Row

Spans = list[tuple[int, int]]
ALIGNMENT, FILL = 64, 128  # elements
# As Megatron registers the parameters of a layer.
_ORDER = (
    *("input_layernorm", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm"),
    *("pre_mlp_layernorm", "router", "linear_fc1", "linear_fc2"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the parameters of one rank take."""

    parameters: int  # without filling
    weights: int  # bytes, filling included
    gradients: int
    optimizer: int


def sizes_of(parallel: ParallelConfig) -> Sizes:
    return Sizes(
        tp=parallel.tensor,
        pp=parallel.pipeline,
        ep=parallel.expert,
        etp=parallel.ranks_per_expert,
    )


def held_bytes(
    model: Model,
    parallel: ParallelConfig,
    *,
    world_size: int,
    stage: int,
    dtype_bytes: int,
    dp_rank: int = 0,
    expert_dp_rank: int = 0,
) -> Held:
    """Of the ranks of pipeline stage `stage` with these places among the data-parallel ones.

    Where parameters leave no gaps the first of them holds no less than the others.
    """
    sizes = sizes_of(parallel)
    ranks = world_size // sizes.pp
    parts = [
        (_dense(model, sizes, stage), ranks // sizes.tp, dp_rank),
        (_of_experts(model, sizes), ranks // (sizes.ep * sizes.etp), expert_dp_rank),
    ]
    parameters = filled = mine = 0
    for buckets, owners, owner in parts:
        for spans in buckets:
            end = _up(spans[-1][1], math.lcm(owners, FILL))
            share = end // owners
            parameters += sum(stop - start for start, stop in spans)
            filled += end
            mine += _overlap(spans, owner * share, (owner + 1) * share)
    states = 3 if dtype_bytes < 4 else 2
    return Held(
        parameters=parameters,
        weights=filled * dtype_bytes,
        gradients=filled * 4,
        optimizer=mine * 4 * states,
    )


def total_parameters(model: Model) -> int:
    """Of the whole model, a tied head counted once: the published number."""
    return sum(math.prod(shape) for shape in model.table.hf_shapes().values())


@cache
def _dense(model: Model, sizes: Sizes, stage: int) -> list[Spans]:
    """Where the dense parameters of a stage lie, by bucket."""
    table = model.table
    layer = [_elements(row, sizes) for row in _sorted(table.layers) if not row.experts]
    layers = layer * len(stage_layers(table.num_layers, stage, sizes.pp))
    is_first, is_last = stage == 0, stage == sizes.pp - 1
    tied = any(not row.exported for row in table.last)
    first = [_elements(row, sizes) for row in table.first] if is_first else []
    last = [_elements(row, sizes) for row in table.last if row.exported or not is_first]
    last = last if is_last else []
    if not tied or sizes.pp == 1:
        return [_lay_out([*first, *layers, *last])]
    # The embedding and its copy at the other end are kept apart, so that both are cut alike.
    rest = _lay_out([*layers, *last[:-1]])
    return [rest] + [_lay_out([part]) for part in (*first, *last[-1:])]


@cache
def _of_experts(model: Model, sizes: Sizes) -> list[Spans]:
    table = model.table
    expert = [_elements(row, sizes) for row in _sorted(table.layers) if row.experts]
    if not expert:
        return []
    held = len(rank_experts(table.num_experts, 0, sizes.ep)) * (table.num_layers // sizes.pp)
    return [_lay_out(expert * held)]


def _lay_out(parameters: Sequence[int]) -> Spans:
    """Start and end of each parameter in its bucket; one span for all that leave no gap."""
    if not any(size % ALIGNMENT for size in parameters):
        return [(0, sum(parameters))]
    spans, end = [], 0
    for size in reversed(parameters):
        start = _up(end, ALIGNMENT)
        end = start + size
        spans.append((start, end))
    return spans


def _overlap(spans: Spans, low: int, high: int) -> int:
    return sum(max(0, min(stop, high) - max(start, low)) for start, stop in spans)


def _sorted(rows: tuple[Row, ...]) -> list[Row]:
    def place(row: Row) -> int:
        return next(i for i, part in enumerate(_ORDER) if part in row.megatron[0])

    return sorted(rows, key=place)


def _elements(row: Row, sizes: Sizes) -> int:
    return math.prod(local_shape(row, sizes.ways(row)))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
