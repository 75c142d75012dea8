"""Reading and writing Hugging Face model folders.

Reading touches only what is asked for: shapes from the files' headers, values slice by slice.
Writing streams shards into a temporary folder beside the target and renames it at the end, so
that whatever fails leaves the target as it was.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megasd.weights.layout import fill, local_shape
from megasd.weights.tables import table_for
from megasd.weights.tables.table import Row, Table

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); write it anew") from error


class HFFolder:
    """A Hugging Face folder whose weights are one safetensors file, or several and an index.

    Raises ValueError, naming the file, when one that the index names is absent or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: dict[str, str] = {}  # file by tensor name
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, Any] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index else [SINGLE_FILE]:
            self._open[file] = self._opened(file)
            for name in self._open[file].keys():  # noqa: SIM118 - not a dict
                self.files[name] = file
                self.shapes[name] = tuple(self._open[file].get_slice(name).get_shape())
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

    def get_slice(self, name: str) -> Any:
        """The tensor still in its file: indexing it with slices reads only those."""
        return self._open[self.files[name]].get_slice(name)

    def check(self, table: Table) -> None:
        """Raises one ValueError that lists every missing, unused and wrongly shaped tensor."""
        expected = table.hf_shapes()
        errors = [f"{name} is missing" for name in expected if name not in self.shapes]
        for name, shape in self.shapes.items():
            where = f"{name} in {self.files[name]}"
            original = table.copies.get(name)
            wanted = expected.get(original or name)
            if wanted is None:
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
        if errors:
            raise ValueError(
                f"model.path: {self.path} does not hold the model of its config.json: "
                + "; ".join(errors)
            )


def load_parameter(
    folder: HFFolder, row: Row, layer: int | None, tp_rank: int, tp_size: int, dtype: torch.dtype
) -> Tensor:
    """The Megatron tensor of one rank on the CPU; `layer` counts within the model.

    Only the rank's slices are read. Padding rows of a vocabulary are zero.
    """
    local = torch.zeros(local_shape(row, tp_size), dtype=dtype)
    fill(local, row, [folder.get_slice(tensor.at(layer)) for tensor in row.hf], tp_rank, tp_size)
    return local


def write_hf_folder(
    target: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    source_folder: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `tensors` and what else `source_folder` holds of the model as a folder `target`.

    Files hold `max_shard_bytes` at most (a larger tensor is alone) and are written as tensors
    arrive. Names and shapes are checked against the table of the source's config.json before the
    target appears. Raises ValueError when the target exists and is not empty, when a tensor is
    missing, unknown or of the wrong shape, or when the folder cannot be written; the target is
    then as it was before.
    """
    target, source = Path(target), Path(source_folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; choose another one")
    hf_config = read_hf_config(source)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        dtype = _write_shards(partial, tensors, max_shard_bytes)
        HFFolder(partial).check(table_for(hf_config))
        key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
        hf_config[key] = str(dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        for found in (found for pattern in CARRIED_OVER for found in source.glob(pattern)):
            (shutil.copytree if found.is_dir() else shutil.copyfile)(found, partial / found.name)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{target} could not be written ({error}); free the disk or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> torch.dtype:
    """Writes the safetensors files and their index; returns the dtype that all tensors have."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()
    shard_bytes = total_bytes = 0

    def flush() -> None:
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtypes.add(tensor.dtype)
    flush()
    if len(dtypes) != 1:
        raise ValueError(f"the tensors to write have the dtypes {dtypes} instead of one")
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE_FILE)
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"{number}.safetensors").rename(folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return dtypes.pop()
