"""The safetensors files of a folder as a plan: which tensor lies where in which file.

A plan is read off a folder's headers, kept as text, changed to another dtype, and written to as
tensors arrive: with the same plan the same tensors make the same files, byte for byte.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasd.weights.torch_record import memory_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a tensor lie, counted from the end of the file's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its header's JSON as it stands there, padding included."""

    name: str
    header: str
    tensors: Mapping[str, Place]  # in the order of their bytes

    @classmethod
    def parse(cls, name: str, header: str) -> "TensorFile":
        """Raises ValueError for a dtype that is not one of a model's weights."""
        places: dict[str, Place] = {}
        for tensor, said in json.loads(header).items():
            if tensor == "__metadata__":
                continue
            if said["dtype"] not in DTYPES:
                raise ValueError(
                    f"{name}: {tensor} has dtype {said['dtype']}; only {', '.join(DTYPES)} are "
                    "supported, use the model's unquantized weights"
                )
            dtype, (start, stop) = DTYPES[said["dtype"]], said["data_offsets"]
            places[tensor] = Place(dtype, tuple(said["shape"]), start, stop)
        return cls(name, header, dict(sorted(places.items(), key=lambda item: item[1].start)))

    @property
    def start(self) -> bytes:
        """What the file begins with: the header's length and the header."""
        header = self.header.encode()
        return len(header).to_bytes(8, "little") + header

    @property
    def size(self) -> int:
        return len(self.start) + max((place.stop for place in self.tensors.values()), default=0)

    def recast(self, dtypes: Mapping[str, torch.dtype]) -> "TensorFile":
        """The same tensors in the same order in other dtypes; itself if that changes nothing."""
        if all(place.dtype == dtypes[name] for name, place in self.tensors.items()):
            return self
        said = json.loads(self.header)
        header: dict[str, Any] = {k: v for k, v in said.items() if k == "__metadata__"}
        start = 0
        for name, place in self.tensors.items():
            stop = start + math.prod(place.shape) * dtypes[name].itemsize
            header[name] = {
                "dtype": _NAMES[dtypes[name]],
                "shape": list(place.shape),
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(header, separators=(",", ":"))
        text += " " * (-len(text.encode()) % 8)  # as safetensors aligns what follows
        return TensorFile.parse(self.name, text)


def read_plan_of(folder: Path, files: Sequence[str]) -> tuple[TensorFile, ...]:
    """The plan of a folder whose files have been opened, and so checked, before."""
    plan = []
    for name in files:
        with (folder / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            plan.append(TensorFile.parse(name, file.read(length).decode()))
    return tuple(plan)


def index_of(plan: Sequence[TensorFile]) -> str:
    """The text of the index that several files need."""
    places = {name: place for file in plan for name, place in file.tensors.items()}
    total = sum(place.stop - place.start for place in places.values())
    parameters = sum(math.prod(place.shape) for place in places.values())
    where = {name: file.name for file in plan for name in file.tensors}
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(where.items())),
    }
    return json.dumps(index, indent=2) + "\n"


class PlanWriter:
    """Writes the files of a plan into a folder, tensor by tensor in any order, keeping none."""

    def __init__(self, folder: Path, plan: Sequence[TensorFile]) -> None:
        self.places = {name: (file, place) for file in plan for name, place in file.tensors.items()}
        self._folder = folder
        self._written: set[str] = set()
        for file in plan:
            (folder / file.name).write_bytes(file.start)

    def put(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError when the plan has no such tensor or one of another shape or dtype."""
        if name not in self.places:
            raise ValueError(f"{name} is not among the tensors to be written")
        file, place = self.places[name]
        if (tuple(tensor.shape), tensor.dtype) != (place.shape, place.dtype):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype} instead of "
                f"{place.shape} and {place.dtype}"
            )
        with (self._folder / file.name).open("r+b") as out:
            out.seek(len(file.start) + place.start)
            out.write(memory_of(tensor.detach().cpu().contiguous()))
        self._written.add(name)

    def missing(self) -> list[str]:
        return [name for name in self.places if name not in self._written]
