"""Which slice of which Hugging Face tensor lies where in a rank's Megatron tensor: arithmetic only.

One list of `Piece`s per (row, rank) serves all directions: reading slices from files, splitting
full tensors, merging shards back. `rank` and `ways` are of the group that cuts the row:
tensor parallel, or expert-tensor parallel for the parameters of experts (`Sizes.ways`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megasd.weights.tables.table import Entry, Row, Table, entries_of

Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """`local[local_slices]` is `hf[source][source_slices]`."""

    source: int  # index into `row.hf`
    source_slices: Slices
    local_slices: Slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many ways a model is cut."""

    tp: int = 1
    pp: int = 1
    ep: int = 1  # experts over ranks, that are data parallel (or tensor parallel) otherwise
    etp: int = 1  # one expert over ranks

    def ways(self, row: Row) -> int:
        """Ranks over which one parameter of the row is cut."""
        return self.etp if row.experts else self.tp


def layout_errors(table: Table, sizes: Sizes) -> list[str]:
    """Why the model cannot be cut this way; empty when it can."""
    errors = [error for row in table.layers if (error := _row_error(row, sizes.ways(row)))]
    if table.num_layers % sizes.pp:
        errors.append(
            f"parallel.pipeline: {sizes.pp} stages do not divide the model's "
            f"{table.num_layers} layers"
        )
    if table.num_experts % sizes.ep or (sizes.ep > 1 and not table.num_experts):
        errors.append(
            f"parallel.expert: {sizes.ep} does not divide the {table.num_experts} experts of "
            f"{table.model_type}"
        )
    return errors


def held_entries(table: Table, sizes: Sizes, pp_rank: int, ep_rank: int) -> list[Entry]:
    """What a rank's model is made of. A tied head is the embedding unless stages part them."""
    mine = rank_experts(table.num_experts, ep_rank, sizes.ep)
    held = [Entry(row, None) for row in table.first if pp_rank == 0]
    held += [
        entry
        for layer in stage_layers(table.num_layers, pp_rank, sizes.pp)
        for entry in entries_of(table.layers, layer)
        if entry.expert is None or entry.expert in mine
    ]
    if pp_rank == sizes.pp - 1:
        held += [Entry(row, None) for row in table.last if row.exported or pp_rank > 0]
    return held


def rank_experts(num_experts: int, ep_rank: int, ep_size: int) -> range:
    """The experts of an expert-parallel rank; all ranks hold the same number."""
    share = num_experts // ep_size
    return range(ep_rank * share, (ep_rank + 1) * share)


def stage_layers(num_layers: int, pp_rank: int, pp_size: int) -> range:
    """The layer numbers of a pipeline stage; all stages hold the same number of layers."""
    if num_layers % pp_size:
        raise ValueError(f"parallel.pipeline: {pp_size} stages do not divide {num_layers} layers")
    share = num_layers // pp_size
    return range(pp_rank * share, (pp_rank + 1) * share)


def local_shape(row: Row, ways: int) -> tuple[int, ...]:
    """Shape of the Megatron tensor on each rank."""
    if error := _row_error(row, ways):
        raise ValueError(error)
    rows, *rest = row.hf[0].shape
    if row.kind == "replicated":
        return row.hf[0].shape
    if row.kind == "row":
        return (rows, rest[0] // ways)
    if row.kind == "vocabulary":
        return (math.ceil(rows / ways), *rest)
    return (sum(tensor.shape[0] for tensor in row.hf) // ways, *rest)


def read_plan(row: Row, rank: int, ways: int) -> tuple[Piece, ...]:
    """The pieces of a rank's Megatron tensor. Only padding rows of a vocabulary lie in no piece."""
    shape = local_shape(row, ways)
    everything = tuple(slice(0, size) for size in shape)
    if row.kind == "replicated":
        return (Piece(0, everything, everything),)
    if row.kind == "row":
        columns = slice(rank * shape[1], (rank + 1) * shape[1])
        return (Piece(0, (everything[0], columns), everything),)
    rest = everything[1:]
    if row.kind == "vocabulary":
        start = min(rank * shape[0], row.hf[0].shape[0])
        stop = min(start + shape[0], row.hf[0].shape[0])
        return (Piece(0, (slice(start, stop), *rest), (slice(0, stop - start), *rest)),)
    blocks = row.groups if row.kind == "qkv" else ways
    pieces, start = [], 0
    for block in range(rank * blocks // ways, (rank + 1) * blocks // ways):
        for source, tensor in enumerate(row.hf):
            size = tensor.shape[0] // blocks
            rows = slice(block * size, (block + 1) * size)
            pieces.append(Piece(source, (rows, *rest), (slice(start, start + size), *rest)))
            start += size
    return tuple(pieces)


def fill(local: Tensor, row: Row, sources: Sequence[Any], rank: int, ways: int) -> None:
    """Copies the rank's slices of `sources`, in the order of `row.hf`, into `local`, in place.

    Sources are tensors, or tensors still in their file: whatever slices index.
    """
    for piece in read_plan(row, rank, ways):
        local[piece.local_slices] = sources[piece.source][piece.source_slices]


def merge(row: Row, shards: Sequence[Tensor], full: Sequence[Tensor]) -> None:
    """Writes the Megatron tensors of all ranks, in order, into the Hugging Face tensors `full`.

    The opposite of `fill`. A replicated parameter is taken from rank 0.
    """
    for rank, shard in enumerate(shards[:1] if row.kind == "replicated" else shards):
        for piece in read_plan(row, rank, len(shards)):
            full[piece.source][piece.source_slices] = shard[piece.local_slices]


def _row_error(row: Row, ways: int) -> str | None:
    if row.kind in ("replicated", "vocabulary"):
        return None
    dimension = 1 if row.kind == "row" else 0
    what, sizes = f"dimension {dimension} of", [t.shape[dimension] for t in row.hf]
    if row.kind == "qkv":
        what, sizes = "key-value heads of", [row.groups]
    key = "parallel.expert_tensor" if row.experts else "parallel.tensor"
    for tensor, size in zip(row.hf, sizes, strict=False):
        if size % ways:
            return f"{key}: {ways} does not divide {size}, {what} {tensor.at('*', '*')}"
    return None
