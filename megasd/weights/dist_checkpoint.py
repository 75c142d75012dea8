"""Megatron-core's distributed checkpoints (`torch_dist`) as Hugging Face tensors, without Megatron.

A checkpoint is a folder of `.distcp` files, rows of records (torch_record.py), and `.metadata`,
which says where the chunks of each global tensor lie. The layers of a model are one tensor with
the layer as its first dimension, experts of a layer have a second one: whatever layout saved it,
the checkpoint is the same but for its chunks. Per layer and expert a global tensor is what one
rank alone would hold (layout.py with 1 way), but for rows that pad the vocabulary.
"""

import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megasd.weights.layout import Slices, local_shape, read_plan
from megasd.weights.tables.table import Entry, Row, Table
from megasd.weights.torch_record import RecordFile

METADATA_FILE = ".metadata"
BACKEND_FILE = "metadata.json"
OF_TRAINING = ("optimizer.", "teacher.", "random", "rng_state", "chained_")  # beside the weights

_LAYERS = "decoder.layers.{layer}."


@cache
def sharded_keys(row: Row) -> tuple[str, ...]:
    """The keys under which Megatron saves a row, those of its two layer specs.

    Both call norms by the linear layer that Transformer Engine fuses them with. Only the norm
    before experts differs: Transformer Engine does not fuse it, the local spec calls it as if.
    """
    key = row.megatron[-1].replace("{layer}.", "")
    if row.experts:
        key = row.megatron[0].replace("{layer}.", "").replace("local_experts.{expert}.", "experts.")
    if key == "decoder.layers.pre_mlp_layernorm.weight":
        return key, "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    return (key,)


def leading_shape(table: Table, row: Row) -> tuple[int, ...]:
    """The dimensions that a global tensor has before those of one layer's parameter."""
    if _LAYERS not in row.megatron[0]:
        return ()
    return (table.num_layers, row.experts) if row.experts else (table.num_layers,)


def leading_offset(entry: Entry) -> tuple[int, ...]:
    return tuple(number for number in (entry.layer, entry.expert) if number is not None)


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or the newest checkpoint of the run that it is the folder of."""
    if (path / METADATA_FILE).is_file():
        return path
    found = (path / "checkpoints").glob("step_*[0-9]")
    steps = sorted(found, key=lambda step: int(step.name.removeprefix("step_")))
    if steps and (steps[-1] / METADATA_FILE).is_file():
        return steps[-1]
    raise ValueError(
        f"{path} holds neither {METADATA_FILE} nor checkpoints/step_*; give a distributed "
        "checkpoint of Megatron or the folder of a run that saved one"
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a global tensor and the record that holds it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class DistCheckpoint:
    """A distributed checkpoint whose `.metadata` has been read and whose files are long enough.

    `.metadata` is a pickle and trusted, as Megatron trusts it. Raises ValueError, naming the file,
    when one is absent, cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.chunks: dict[str, list[Chunk]] = {}
        self._files: dict[str, RecordFile] = {}
        self._checked: set[tuple[str, int]] = set()
        self._by_leading: dict[str, Mapping[tuple[int, ...], list[Chunk]]] = {}
        metadata = self._metadata()
        places = {}
        for index, place in metadata.storage_data.items():
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"{path}: {index.fqn} is compressed; save it without extensions")
            places[index.fqn, tuple(index.offset or ())] = place
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                self.tensors[key] = stored
                self.chunks[key] = [
                    Chunk(tuple(c.offsets), tuple(c.sizes), p.relative_path, p.offset, p.length)
                    for c in stored.chunks
                    if (p := places.get((key, tuple(c.offsets)))) is not None
                ]
        self._check_files(metadata.storage_data.values())

    def _metadata(self) -> Any:
        file = self.path / METADATA_FILE
        try:
            with file.open("rb") as stream:
                return pickle.load(stream)
        except FileNotFoundError as error:
            raise ValueError(f"{file} does not exist; it is part of every checkpoint") from error
        except Exception as error:  # a pickle fails in as many ways as it has bytes
            raise ValueError(f"{file} is cut short or damaged ({error!r})") from error

    def _check_files(self, places: Any) -> None:
        ends: dict[str, int] = {}
        for place in places:
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        for name, end in sorted(ends.items()):
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                raise ValueError(f"{file} does not exist although {METADATA_FILE} names it")
            if size < end:
                raise ValueError(
                    f"{file} is cut short: it has {size} bytes of {end}; copy the checkpoint again"
                )
        self.file_names = tuple(sorted(ends))

    def key_of(self, row: Row) -> str | None:
        """The key that holds a row here."""
        return next((key for key in sharded_keys(row) if key in self.tensors), None)

    def problems(self, table: Table) -> list[str]:
        """Every missing, unused, wrongly shaped and incompletely stored tensor."""
        found, known = [], set()
        for row in (*table.first, *table.layers, *table.last):
            known.update(sharded_keys(row))
            if not row.exported:
                continue  # a tied head is no tensor of its own
            key = self.key_of(row)
            if key is None:
                found.append(f"{sharded_keys(row)[0]} is missing")
                continue
            wanted = (*leading_shape(table, row), *local_shape(row, 1))
            shape, padded = tuple(self.tensors[key].size), row.kind == "vocabulary"
            fits = shape == wanted or (padded and shape[1:] == wanted[1:] and shape[0] >= wanted[0])
            if not fits:
                found.append(f"{key} has shape {shape} instead of {wanted}")
            elif not self._is_whole(key):
                found.append(f"the chunks of {key} do not cover it")
        found += [
            f"{key} is not a tensor of {table.model_type}"
            for key in self.tensors
            if key not in known and not key.startswith(OF_TRAINING)
        ]
        return found

    def check(self, table: Table) -> None:
        """Raises one ValueError that lists all problems."""
        if problems := self.problems(table):
            raise ValueError(
                f"{self.path} does not hold the model of its config.json: " + "; ".join(problems)
            )

    def _is_whole(self, key: str) -> bool:
        """Whether the chunks lie inside, are all stored, and fill the tensor without overlap."""
        size, stored = tuple(self.tensors[key].size), self.tensors[key].chunks
        chunks = {chunk.offsets: chunk.shape for chunk in self.chunks[key]}
        inside = all(
            start + length <= end
            for offsets, shape in chunks.items()
            for start, length, end in zip(offsets, shape, size, strict=True)
        )
        filled = sum(math.prod(shape) for shape in chunks.values()) == math.prod(size)
        return inside and filled and len(chunks) == len(stored)

    def dtype_of(self, row: Row) -> torch.dtype:
        key = self.key_of(row)
        assert key is not None, "checked before"
        return self.tensors[key].properties.dtype

    def read(self, entry: Entry) -> tuple["Part", ...]:
        """Each Hugging Face tensor of an entry, still in its chunks."""
        key, row = self.key_of(entry.row), entry.row
        assert key is not None, "checked before"
        plan = read_plan(row, 0, 1)
        return tuple(
            Part(self, key, leading_offset(entry), tensor.shape, self.dtype_of(row), places)
            for index, tensor in enumerate(row.hf)
            if (places := [(p.source_slices, p.local_slices) for p in plan if p.source == index])
        )

    def chunks_at(self, key: str, leading: tuple[int, ...]) -> list[Chunk]:
        """The chunks that hold a part of one layer's (and expert's) parameter."""
        if key not in self._by_leading:
            by_leading: dict[tuple[int, ...], list[Chunk]] = {}
            for chunk in self.chunks[key]:
                for at in _boxes(chunk.offsets, chunk.shape, len(leading)):
                    by_leading.setdefault(at, []).append(chunk)
            self._by_leading[key] = by_leading
        return self._by_leading[key].get(leading, [])

    def values(self, key: str, chunk: Chunk) -> Tensor:
        """The chunk as it lies in its file; its checksum is looked at the first time."""
        at = (chunk.file, chunk.start)
        if chunk.file not in self._files:
            self._files[chunk.file] = RecordFile(self.path / chunk.file)
        try:
            values = self._files[chunk.file].read(
                chunk.start, chunk.length, check=at not in self._checked
            )
            if tuple(values.shape) != chunk.shape:
                raise ValueError(f"its shape is {tuple(values.shape)} instead of {chunk.shape}")
            if values.dtype != self.tensors[key].properties.dtype:
                raise ValueError(f"its dtype is {values.dtype}")
        except ValueError as error:
            raise ValueError(
                f"{self.path / chunk.file} is damaged: at byte {chunk.start}, in {key}, {error}; "
                "copy the checkpoint again"
            ) from error
        self._checked.add(at)
        return values


@dataclass(frozen=True, slots=True)
class Part:
    """One Hugging Face tensor within one layer's parameter of a checkpoint."""

    checkpoint: DistCheckpoint
    key: str
    leading: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    places: list[tuple[Slices, Slices]]  # of the tensor, of the parameter

    def tensor(self) -> Tensor:
        """The whole tensor, contiguous; it may share memory with the checkpoint's file."""
        chunks = self.checkpoint.chunks_at(self.key, self.leading)
        whole: Tensor | None = None
        for chunk in chunks:
            values = self.checkpoint.values(self.key, chunk)
            depth = len(self.leading)
            inner = values[
                tuple(at - start for at, start in zip(self.leading, chunk.offsets, strict=False))
            ]
            box = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.offsets[depth:], chunk.shape[depth:], strict=True)
            )
            for mine, theirs in self.places:
                common = tuple(_common(a, b) for a, b in zip(theirs, box, strict=True))
                if any(part.start >= part.stop for part in common):
                    continue
                source = inner[_within(common, box)]
                if tuple(source.shape) == self.shape and source.is_contiguous():
                    return source
                if whole is None:
                    whole = torch.empty(self.shape, dtype=self.dtype)
                target = tuple(
                    slice(c.start - t.start + m.start, c.stop - t.start + m.start)
                    for c, t, m in zip(common, theirs, mine, strict=True)
                )
                whole[target] = source
        assert whole is not None, f"{self.key}: checked to be covered"
        return whole


def _boxes(
    offsets: tuple[int, ...], shape: tuple[int, ...], depth: int
) -> Iterator[tuple[int, ...]]:
    """Every leading offset that a chunk spans: one, in what Megatron writes."""
    if depth == 0:
        yield ()
        return
    for rest in _boxes(offsets, shape, depth - 1):
        for at in range(offsets[depth - 1], offsets[depth - 1] + shape[depth - 1]):
            yield (*rest, at)


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _within(inner: Slices, outer: Slices) -> Slices:
    """`inner` counted from where `outer` starts."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True)
    )
