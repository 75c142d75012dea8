"""What a distributed checkpoint of a Hugging Face folder consists of, before a byte is written.

Every model-parallel rank of the layout gets one file with the records of its parameters, so that
ranks of that layout read their own file only (replicated parameters lie in the file of the first
tensor-parallel rank). Any other layout can load it too.
"""

import io
import math
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megasd.weights.dist_checkpoint import leading_offset, leading_shape, sharded_keys
from megasd.weights.hf_folder import HFFolder, load_parameter
from megasd.weights.layout import Piece, Sizes, held_entries, local_shape, read_plan
from megasd.weights.partial_folder import Bytes
from megasd.weights.tables.table import Entry, Row, Table
from megasd.weights.torch_record import frame, memory_of

LARGEST_RECORD = 2**29  # bytes; a larger parameter is cut into rows


@dataclass(frozen=True, slots=True)
class Cut:
    """What one record holds: a rank's slice of a parameter, or some rows of it."""

    entry: Entry
    rank: int
    ways: int
    piece: Piece | None  # None: all pieces of the rank, side by side
    offset: tuple[int, ...]  # within the global tensor
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        names = self.entry.hf_names()
        return " or ".join(names) if self.piece is None else names[self.piece.source]

    def read(self, folder: HFFolder, dtype: torch.dtype) -> Tensor:
        """The values, contiguous; they may share memory with the folder's file."""
        if self.piece is None:
            local = load_parameter(folder, self.entry, self.rank, self.ways, dtype)
            return local.view(self.shape)
        source = folder.get_slice(self.entry.hf_names()[self.piece.source])
        return source[self.piece.source_slices].to(dtype).contiguous().view(self.shape)

    def copied_bytes(self, dtype: torch.dtype, stored: torch.dtype) -> int:
        """The memory that `read` takes beside the mapped file."""
        whole_rows = self.piece is not None and (self.entry.row.kind != "row" or self.ways == 1)
        return 0 if whole_rows and dtype == stored else math.prod(self.shape) * dtype.itemsize


class CheckpointPlan:
    """The files of a checkpoint: which cuts each holds, and where."""

    def __init__(self, table: Table, sizes: Sizes, dtypes: Mapping[Row, torch.dtype]) -> None:
        self.table, self.dtypes = table, dtypes
        self.files = _files(table, sizes, dtypes)
        self.sizes: dict[str, int] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._objects: list[str] = []
        for name, cuts in self.files.items():
            position = len(_nothing())
            for cut in cuts:
                dtype = dtypes[cut.entry.row]
                before, after = frame(dtype, cut.shape, position)
                length = len(before) + math.prod(cut.shape) * dtype.itemsize + len(after)
                self._note(cut, _StorageInfo(name, position, length))
                position += length
            self._note_states(name, cuts)
            self.sizes[name] = position

    def bytes_of(
        self, name: str, folder: HFFolder, look: Callable[[str, Tensor], None]
    ) -> Iterator[Bytes]:
        """One file, block by block; `look` sees the values with the names of their tensors."""
        position = len(_nothing())
        yield _nothing()
        for cut in self.files[name]:
            dtype = self.dtypes[cut.entry.row]
            values = cut.read(folder, dtype)
            look(cut.name, values)
            memory = memory_of(values)
            before, after = frame(dtype, cut.shape, position, zlib.crc32(memory))
            yield from (before, memory, after)
            position += len(before) + len(memory) + len(after)

    def metadata(self) -> bytes:
        """The content of `.metadata`."""
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for row in (*self.table.first, *self.table.layers, *self.table.last):
            for key in sharded_keys(row):
                if key in self._chunks:
                    size = torch.Size((*leading_shape(self.table, row), *local_shape(row, 1)))
                    properties = TensorProperties(dtype=self.dtypes[row])
                    tensors[key] = TensorStorageMetadata(properties, size, self._chunks[key])
        tensors |= {key: BytesStorageMetadata() for key in self._objects}
        return pickle.dumps(Metadata(tensors, storage_data=self._storage, version="1.0.0"))

    def _note(self, cut: Cut, place: _StorageInfo) -> None:
        for key in sharded_keys(cut.entry.row):
            chunk = ChunkStorageMetadata(torch.Size(cut.offset), torch.Size(cut.shape))
            self._chunks.setdefault(key, []).append(chunk)
            self._storage[MetadataIndex(key, cut.offset)] = place

    def _note_states(self, file: str, cuts: list[Cut]) -> None:
        """Megatron asks for the extra state of every linear layer, Transformer Engine of norms too.

        That of a model without FP8 is None; all of a file point to the one at its start.
        """
        for cut in cuts:
            if cut.rank == 0 and not any(cut.offset[len(leading_offset(cut.entry)) :]):
                for key in _state_keys(self.table, cut.entry):
                    self._objects.append(key)
                    self._storage[MetadataIndex(key)] = _StorageInfo(file, 0, len(_nothing()))


@cache
def _nothing() -> bytes:
    """The record of an object that is None."""
    out = io.BytesIO()
    torch.save([None], out)
    return out.getvalue()


def _state_keys(table: Table, entry: Entry) -> Iterator[str]:
    key = sharded_keys(entry.row)[0]
    shape = leading_shape(table, entry.row) or (1,)
    at = leading_offset(entry) or (0,)
    shard = f"/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, shape))}"
    if key.startswith("decoder.") and key.endswith(".weight") and not key.endswith("router.weight"):
        yield f"{key.removesuffix('weight')}_extra_state{shard}"
    if key.endswith(".linear_proj.weight"):
        yield f"{key.removesuffix('linear_proj.weight')}core_attention._extra_state{shard}"


def _files(table: Table, sizes: Sizes, dtypes: Mapping[Row, torch.dtype]) -> dict[str, list[Cut]]:
    """The cuts of each model-parallel rank, by the name of its file."""
    experts = sizes.ep * sizes.etp
    stage = math.lcm(sizes.tp, experts)  # ranks
    files: dict[str, list[Cut]] = {}
    for pp_rank in range(sizes.pp):
        for place in range(stage):
            ep_rank = place // sizes.etp % sizes.ep
            cuts = files[f"__{pp_rank * stage + place}_0.distcp"] = []
            for entry in held_entries(table, sizes, pp_rank, ep_rank):
                ways = sizes.ways(entry.row)
                writers = sizes.tp if entry.expert is None else experts
                rank = place % ways
                first_of_replicas = entry.row.kind != "replicated" or rank == 0
                if entry.row.exported and place < writers and first_of_replicas:
                    cuts += _cuts(entry, rank, ways, dtypes[entry.row])
    return {name: cuts for name, cuts in files.items() if cuts}


def _cuts(entry: Entry, rank: int, ways: int, dtype: torch.dtype) -> Iterator[Cut]:
    """A rank's slice of one parameter."""
    row, at = entry.row, leading_offset(entry)
    ones = (1,) * len(at)
    if row.kind == "qkv":
        shape = local_shape(row, ways)
        yield Cut(entry, rank, ways, None, (*at, rank * shape[0], 0), (*ones, *shape))
        return
    for piece in read_plan(row, rank, ways):
        # Gate and up, and their like, lie one after the other in the global tensor.
        base = sum(tensor.shape[0] for tensor in row.hf[: piece.source])
        rows, *rest = piece.source_slices
        width = math.prod(part.stop - part.start for part in rest) * dtype.itemsize
        step = max(1, LARGEST_RECORD // width)
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            slices = (part, *rest)
            offset = (*at, base + start, *(other.start for other in rest))
            shape = (*ones, *(s.stop - s.start for s in slices))
            yield Cut(entry, rank, ways, Piece(piece.source, slices, ()), offset, shape)
