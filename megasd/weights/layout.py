"""Which slice of which Hugging Face tensor lies where in a rank's Megatron tensor: arithmetic only.

One list of `Piece`s per (row, rank) serves all directions: reading slices from files, splitting
full tensors, merging shards back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megasd.weights.tables.table import Row, Table

Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """`local[local_slices]` is `hf[source][source_slices]`."""

    source: int  # index into `row.hf`
    source_slices: Slices
    local_slices: Slices


def layout_errors(table: Table, tp_size: int, pp_size: int) -> list[str]:
    """Why the model cannot be cut this way; empty when it can."""
    errors = [error for row in table.layers if (error := _row_error(row, tp_size))]
    if table.num_layers % pp_size:
        errors.append(
            f"parallel.pipeline: {pp_size} stages do not divide the model's "
            f"{table.num_layers} layers"
        )
    return errors


def stage_layers(num_layers: int, pp_rank: int, pp_size: int) -> range:
    """The layer numbers of a pipeline stage; all stages hold the same number of layers."""
    if num_layers % pp_size:
        raise ValueError(f"parallel.pipeline: {pp_size} stages do not divide {num_layers} layers")
    share = num_layers // pp_size
    return range(pp_rank * share, (pp_rank + 1) * share)


def local_shape(row: Row, tp_size: int) -> tuple[int, ...]:
    """Shape of the Megatron tensor on each tensor-parallel rank."""
    if error := _row_error(row, tp_size):
        raise ValueError(error)
    rows, *rest = row.hf[0].shape
    if row.kind == "replicated":
        return row.hf[0].shape
    if row.kind == "row":
        return (rows, rest[0] // tp_size)
    if row.kind == "vocabulary":
        return (math.ceil(rows / tp_size), *rest)
    return (sum(tensor.shape[0] for tensor in row.hf) // tp_size, *rest)


def read_plan(row: Row, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
    """The pieces of a rank's Megatron tensor. Only padding rows of a vocabulary lie in no piece."""
    shape = local_shape(row, tp_size)
    everything = tuple(slice(0, size) for size in shape)
    if row.kind == "replicated":
        return (Piece(0, everything, everything),)
    if row.kind == "row":
        columns = slice(tp_rank * shape[1], (tp_rank + 1) * shape[1])
        return (Piece(0, (everything[0], columns), everything),)
    rest = everything[1:]
    if row.kind == "vocabulary":
        start = min(tp_rank * shape[0], row.hf[0].shape[0])
        stop = min(start + shape[0], row.hf[0].shape[0])
        return (Piece(0, (slice(start, stop), *rest), (slice(0, stop - start), *rest)),)
    blocks = row.groups if row.kind == "qkv" else tp_size
    pieces, start = [], 0
    for block in range(tp_rank * blocks // tp_size, (tp_rank + 1) * blocks // tp_size):
        for source, tensor in enumerate(row.hf):
            size = tensor.shape[0] // blocks
            rows = slice(block * size, (block + 1) * size)
            pieces.append(Piece(source, (rows, *rest), (slice(start, start + size), *rest)))
            start += size
    return tuple(pieces)


def fill(local: Tensor, row: Row, sources: Sequence[Any], tp_rank: int, tp_size: int) -> None:
    """Copies the rank's slices of `sources`, in the order of `row.hf`, into `local`, in place.

    Sources are tensors, or tensors still in their file: whatever slices index.
    """
    for piece in read_plan(row, tp_rank, tp_size):
        local[piece.local_slices] = sources[piece.source][piece.source_slices]


def merge(row: Row, layer: int | None, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """Full Hugging Face tensors, in new memory, from the Megatron tensors of all ranks in order.

    A replicated parameter is taken from rank 0.
    """
    full = [shards[0].new_empty(tensor.shape) for tensor in row.hf]
    for tp_rank, shard in enumerate(shards[:1] if row.kind == "replicated" else shards):
        for piece in read_plan(row, tp_rank, len(shards)):
            full[piece.source][piece.source_slices] = shard[piece.local_slices]
    return {tensor.at(layer): value for tensor, value in zip(row.hf, full, strict=True)}


def _row_error(row: Row, tp_size: int) -> str | None:
    if row.kind in ("replicated", "vocabulary"):
        return None
    dimension = 1 if row.kind == "row" else 0
    what, sizes = f"dimension {dimension} of", [t.shape[dimension] for t in row.hf]
    if row.kind == "qkv":
        what, sizes = "key-value heads of", [row.groups]
    for tensor, size in zip(row.hf, sizes, strict=False):
        if size % tp_size:
            name = tensor.name.replace("{layer}", "*")
            return f"parallel.tensor: {tp_size} does not divide {size}, {what} {name}"
    return None
