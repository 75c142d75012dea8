"""Reading and writing Hugging Face model folders.

Reading touches only what is asked for: shapes from the files' headers, values slice by slice.
Writing puts each tensor where the source's files have it, in a temporary folder beside the target
that is renamed at the end, so that whatever fails leaves the target as it was.
"""

import json
import os
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megasd.process.errors import TryAgainError, may_pass
from megasd.weights.hf_files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    PlanWriter,
    TensorFile,
    index_of,
    read_plan_of,
)
from megasd.weights.layout import fill, local_shape
from megasd.weights.tables import table_for
from megasd.weights.tables.table import Entry, Table

CARRIED_OVER = (  # beside config.json, whatever of it the source holds
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
)


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The dict of a folder's config.json."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a Hugging Face model folder holds one")
    try:
        hf_config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); write it anew") from error
    if not isinstance(hf_config, dict):
        raise ValueError(f"{file} is not a JSON object; write it anew")
    return hf_config


class HFFolder:
    """A Hugging Face folder whose weights are one safetensors file, or several and an index.

    Raises ValueError, naming the file, when one that the index names is absent or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: dict[str, str] = {}  # file by tensor name
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors calls them
        self._open: dict[str, Any] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index else [SINGLE_FILE]:
            self._open[file] = self._opened(file)
            for name in self._open[file].keys():  # noqa: SIM118 - not a dict
                self.files[name] = file
                header = self._open[file].get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = header.get_dtype()
        if lost := [f"{name} in {f}" for name, f in index.items() if self.files.get(name) != f]:
            raise ValueError(
                f"{self.path / INDEX_FILE} names tensors that are not there: {', '.join(lost)}; "
                "copy the folder again"
            )

    def _index(self) -> dict[str, str]:
        file = self.path / INDEX_FILE
        if file.is_file():
            try:
                return json.loads(file.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{file} is not a safetensors index ({error!r}); copy it again"
                ) from error
        if not (self.path / SINGLE_FILE).is_file():
            raise ValueError(
                f"model.path: {self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "give a Hugging Face folder with safetensors weights"
            )
        return {}

    def _opened(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.path / file} does not exist although {INDEX_FILE} names it; "
                "copy the folder again"
            ) from error
        except SafetensorError as error:
            raise ValueError(
                f"{self.path / file} is cut short or damaged ({error}); copy it again"
            ) from error

    def plan(self) -> tuple[TensorFile, ...]:
        """Which tensor lies where in which of the files."""
        return read_plan_of(self.path, tuple(self._open))

    def get_slice(self, name: str) -> Any:
        """The tensor still in its file: indexing it with slices reads only those."""
        return self._open[self.files[name]].get_slice(name)

    def problems(self, table: Table) -> list[str]:
        """Every missing, unused and wrongly shaped tensor."""
        expected = table.hf_shapes()
        errors = [f"{name} is missing" for name in expected if name not in self.shapes]
        for name, shape in self.shapes.items():
            where = f"{name} in {self.files[name]}"
            original = table.copies.get(name)
            wanted = expected.get(original or name)
            if self.dtypes[name] not in DTYPES:
                errors.append(
                    f"{where} has dtype {self.dtypes[name]}; only {', '.join(DTYPES)} are "
                    "supported, use the model's unquantized weights"
                )
            elif wanted is None:
                errors.append(f"{where} is not a tensor of {table.model_type}")
            elif shape != wanted:
                errors.append(f"{where} has shape {shape} instead of {wanted}")
            elif original in self.shapes and not torch.equal(
                self.get_slice(name)[:], self.get_slice(original)[:]
            ):
                errors.append(
                    f"{where} differs from {original} although config.json ties them; "
                    "set tie_word_embeddings: false there"
                )
        return errors

    def check(self, table: Table) -> None:
        """Raises one ValueError that lists all problems."""
        if problems := self.problems(table):
            raise ValueError(
                f"model.path: {self.path} does not hold the model of its config.json: "
                + "; ".join(problems)
            )


def load_parameter(
    folder: HFFolder, entry: Entry, rank: int, ways: int, dtype: torch.dtype
) -> Tensor:
    """The Megatron tensor of one rank of the `ways` that cut it, on the CPU.

    Only the rank's slices are read. Padding rows of a vocabulary are zero.
    """
    local = torch.zeros(local_shape(entry.row, ways), dtype=dtype)
    fill(local, entry.row, [folder.get_slice(name) for name in entry.hf_names()], rank, ways)
    return local


def write_hf_folder(
    target: str | Path, tensors: Iterable[tuple[str, Tensor]], source_folder: str | Path
) -> None:
    """Writes `tensors` and what else `source_folder` holds of the model as a folder `target`.

    The files are those of the source: the same names, tensors and order, in the dtype of
    `tensors`, which come in any order; each is written before the next is asked for. Names and
    shapes are checked against the table of the source's config.json before the target appears.
    Raises ValueError when the target exists and is not empty, when a tensor is missing, unknown
    or of the wrong shape, or when the folder cannot be written, TryAgainError when the disk is
    full; the target is then as it was.
    """
    target, source = Path(target), HFFolder(source_folder)
    require_empty(target)
    require_outside(target, source.path)
    table = table_for(read_hf_config(source.path))
    source.check(table)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        dtype = _write_tensors(partial, tensors, source.plan(), table)
        HFFolder(partial).check(table)
        copy_model_files(source.path, partial, dtype)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        kind = TryAgainError if isinstance(error, OSError) and may_pass(error) else ValueError
        raise kind(
            f"{target} could not be written ({error}); free the disk or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_empty(target: Path) -> None:
    """Raises ValueError when there is something at `target`."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; choose another one")


def require_outside(target: Path, *sources: Path) -> None:
    """Raises ValueError when `target` lies in one of `sources`, which are not to be changed."""
    for source in sources:
        if target.resolve().is_relative_to(source.resolve()):
            raise ValueError(
                f"{target} lies inside {source}, which it is made from; choose another"
            )


def copy_model_files(
    source: Path, target: Path, dtype: torch.dtype | None, patterns: Iterable[str] = CARRIED_OVER
) -> None:
    """Copies config.json, that names `dtype` (None: as it is), tokenizer and the like."""
    hf_config = read_hf_config(source)
    key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if dtype is None or hf_config.get(key) == name:
        shutil.copyfile(source / "config.json", target / "config.json")
    else:
        text = json.dumps(hf_config | {key: name}, indent=2) + "\n"
        (target / "config.json").write_text(text)
    for found in sorted({found for pattern in patterns for found in source.glob(pattern)}):
        (shutil.copytree if found.is_dir() else shutil.copyfile)(found, target / found.name)


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], plan: Iterable[TensorFile], table: Table
) -> torch.dtype:
    """Writes the safetensors files and their index; returns the dtype that all tensors have."""
    stream = iter(tensors)
    first = next(stream, None)
    if first is None:
        raise ValueError("there are no tensors to write")
    dtype = first[1].dtype
    files = [file.recast(dict.fromkeys(file.tensors, dtype)) for file in plan]
    writer = PlanWriter(folder, files)
    copies = {original: copy for copy, original in table.copies.items()}
    for name, tensor in chain([first], stream):
        writer.put(name, tensor)
        if copies.get(name) in writer.places:
            writer.put(copies[name], tensor)
    if missing := writer.missing():
        raise ValueError(f"the tensors to write are not complete, {', '.join(missing)} is missing")
    if len(files) > 1:
        (folder / INDEX_FILE).write_text(index_of(files))
    return dtype
