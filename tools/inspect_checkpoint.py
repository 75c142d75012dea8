"""Says what a model's folder holds, and what is wrong with it: exit code 1 if there is something.

    python tools/inspect_checkpoint.py Qwen3-8B --tensors
    python tools/inspect_checkpoint.py runs/math --checksums

For Hugging Face folders, distributed checkpoints of Megatron-core, and folders of runs (their
newest checkpoint). The files of a run's checkpoint are compared with its manifest.json.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megasd.checkpoint.manifest import MANIFEST_FILE, look_at_files, wrong_checksums
from megasd.weights.conversion import COMMON_FILE, HF_PART
from megasd.weights.dist_checkpoint import (
    BACKEND_FILE,
    OF_TRAINING,
    DistCheckpoint,
    find_checkpoint,
)
from megasd.weights.hf_files import INDEX_FILE
from megasd.weights.hf_folder import HFFolder, read_hf_config
from megasd.weights.tables import table_for
from megasd.weights.tables.table import Table


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Findings:
    """What one folder holds."""

    kind: str
    path: Path
    hf_config: Mapping[str, Any] | None = None
    tensors: list[Tensor] = field(default_factory=list)
    shards: dict[str, int] = field(default_factory=dict)  # bytes by file
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--checksums", action="store_true", help="read every byte of a distributed checkpoint"
    )
    args = parser.parse_args()
    try:
        found = inspect(args.path, checksums=args.checksums)
    except (ValueError, OSError) as error:
        print(f"problem: {' '.join(str(error).split())}")
        sys.exit(1)
    print("\n".join(described(found, tensors=args.tensors)))
    sys.exit(bool(found.problems))


def inspect(path: Path, *, checksums: bool) -> Findings:
    """Raises ValueError when there is nothing to look into."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    if (path / "config.json").is_file():
        return inspect_folder(path)
    return inspect_distributed(find_checkpoint(path), checksums=checksums)


def inspect_folder(path: Path) -> Findings:
    found = Findings("Hugging Face folder", path, read_hf_config(path))
    folder = HFFolder(path)
    plan = folder.plan()
    found.shards = {file.name: (path / file.name).stat().st_size for file in plan}
    found.tensors = [
        Tensor(name, place.shape, place.dtype, file.name)
        for file in plan
        for name, place in file.tensors.items()
    ]
    if table := _table(found):
        found.problems += folder.problems(table)
    found.problems += [
        f"{file.name} is not named by {INDEX_FILE}"
        for file in sorted(path.glob("*.safetensors"))
        if file.name not in found.shards
    ]
    assert found.hf_config is not None
    said = found.hf_config.get("dtype") or found.hf_config.get("torch_dtype")
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors}
    if said is not None and said not in stored:
        found.problems.append(f"config.json says {said}, the tensors are {', '.join(stored)}")
    if not any(path.glob("tokenizer*")):
        found.notes.append("no tokenizer")
    return found


def inspect_distributed(path: Path, *, checksums: bool) -> Findings:
    dist = DistCheckpoint(path)
    common = _common(path)
    found = Findings("distributed checkpoint (torch_dist)", path, _config_of(path, common))
    found.shards = {name: (path / name).stat().st_size for name in dist.file_names}
    for key, stored in dist.tensors.items():
        shape, chunks = tuple(stored.size), f"{len(dist.chunks[key])} chunks"
        found.tensors.append(Tensor(key, shape, stored.properties.dtype, chunks))
    if found.hf_config is None:
        found.notes.append("no config.json: names and shapes are not compared with a model")
    elif table := _table(found):
        found.problems += dist.problems(table)
    for file in (BACKEND_FILE, COMMON_FILE):
        if not (path / file).is_file():
            found.problems.append(f"{file} is missing")
    extra = sorted({file.name for file in path.glob("*.distcp")} - found.shards.keys())
    found.problems += [f"{name} is not named by .metadata" for name in extra]
    if "next_step" in common or (path / MANIFEST_FILE).is_file():
        found.problems += _unlike_manifest(path, checksums=checksums)
    if checksums:
        found.problems += _damaged(dist)
    return found


def _common(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds beside its tensors; empty without the file."""
    if not (path / COMMON_FILE).is_file():
        return {}
    try:
        return torch.load(path / COMMON_FILE, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle fails in as many ways as it has bytes
        raise ValueError(f"{path / COMMON_FILE} cannot be read ({error!r})") from error


def _config_of(path: Path, common: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a conversion or a training run keeps of the model's config."""
    if (path / HF_PART / "config.json").is_file():
        return read_hf_config(path / HF_PART)
    return common.get("hf_config")


def _unlike_manifest(path: Path, *, checksums: bool) -> list[str]:
    """What differs from what the run wrote: sizes, and with `checksums` every byte."""
    if not (path / MANIFEST_FILE).is_file():
        return [f"there is no {MANIFEST_FILE}: the checkpoint was not finished"]
    files, wrong, trouble = look_at_files(path)
    if not files:
        wrong = [f"the checkpoint {sentence}" for sentence in wrong]
    if checksums and not wrong and not trouble:
        wrong, trouble = wrong_checksums(path, files, sorted(files))
    return [*wrong, f"{path} cannot be read ({trouble})"] if trouble else wrong


def _table(found: Findings) -> Table | None:
    assert found.hf_config is not None
    try:
        return table_for(found.hf_config)
    except ValueError as error:
        found.problems.append(str(error))
        return None


def _damaged(dist: DistCheckpoint) -> Iterable[str]:
    for key, chunks in dist.chunks.items():
        for chunk in chunks:
            try:
                dist.values(key, chunk)
            except ValueError as error:
                yield str(error)


def described(found: Findings, *, tensors: bool) -> list[str]:
    """The lines to print."""
    weights = [tensor for tensor in found.tensors if not tensor.name.startswith(OF_TRAINING)]
    beside = [tensor for tensor in found.tensors if tensor.name.startswith(OF_TRAINING)]
    bytes_by_dtype = Counter[str]()
    for tensor in weights:
        name = str(tensor.dtype).removeprefix("torch.")
        bytes_by_dtype[name] += tensor.numel * tensor.dtype.itemsize
    config = found.hf_config or {}
    lines = [
        f"{found.path}: {found.kind}",
        f"family: {config.get('model_type', 'unknown')}",
        f"parameters: {sum(tensor.numel for tensor in weights):,}",
        "dtypes: " + ", ".join(f"{name} {size:,} bytes" for name, size in bytes_by_dtype.items()),
        f"tied head: {'yes' if config.get('tie_word_embeddings') else 'no'}",
        f"files: {len(found.shards)}, {sum(found.shards.values()):,} bytes",
        *(f"  {name}  {size:,}" for name, size in found.shards.items()),
    ]
    if beside:
        lines.append(f"beside the weights: {len(beside)} tensors of the training run")
    if tensors:
        width = max((len(tensor.name) for tensor in found.tensors), default=0)
        for tensor in found.tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            lines.append(
                f"  {tensor.name:<{width}}  {dtype:<8}  {tensor.shape!s:<20}  {tensor.where}"
            )
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"problem: {problem}" for problem in found.problems]
    return lines if found.problems else [*lines, "no problems found"]


if __name__ == "__main__":
    main()
