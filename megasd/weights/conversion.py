"""Hugging Face folder to distributed checkpoint and back: file by file, verified before named.

A checkpoint that was converted carries in `hf/` what a Hugging Face folder holds beside the
numbers, its files' headers included: with the dtype unchanged, there and back gives the same
bytes in the same files.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megasd.weights.dist_checkpoint import (
    BACKEND_FILE,
    METADATA_FILE,
    DistCheckpoint,
    Part,
    find_checkpoint,
)
from megasd.weights.dist_writer import CheckpointPlan
from megasd.weights.hf_files import INDEX_FILE, TensorFile, index_of
from megasd.weights.hf_folder import (
    CARRIED_OVER,
    HFFolder,
    copy_model_files,
    read_hf_config,
    require_outside,
)
from megasd.weights.layout import Sizes, layout_errors
from megasd.weights.partial_folder import Bytes, PartialFolder
from megasd.weights.tables import table_for
from megasd.weights.tables.table import Row, Table
from megasd.weights.torch_record import memory_of
from megasd.weights.values import strange_values

HF_PART = "hf"  # within a converted checkpoint
HEADERS_FILE = "safetensors_headers.json"
COMMON_FILE = "common.pt"
CONVERTED_TOO = (*CARRIED_OVER, "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")

Report = Callable[[int, int], None]
"""Called as (bytes written since the last call, bytes in all)."""
Check = Callable[[Path], None]
"""Called with the complete folder before it gets its name; raises ValueError to refuse it."""


def hf_to_megatron(
    source: Path,
    target: Path,
    sizes: Sizes,
    *,
    dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
    report: Report = lambda done, total: None,
    check: Check = lambda folder: None,
) -> None:
    """Writes `source` as a distributed checkpoint with one file per rank of the layout `sizes`.

    `dtype` None keeps that of each tensor. `memory_bytes`: what the process may take, mapped files
    aside. Raises ValueError, with `target` as it was, for whatever is wrong.
    """
    folder = HFFolder(source)
    hf_config = read_hf_config(source)
    table = table_for(hf_config)
    folder.check(table)
    require_outside(target, source)
    errors = layout_errors(table, sizes)
    if sizes.etp > 1 and not table.num_experts:
        errors.append(
            f"parallel.expert_tensor: {sizes.etp} ranks would share an expert, and "
            f"{table.model_type} has none; leave it at 1"
        )
    if errors:
        raise ValueError("; ".join(errors))
    files = folder.plan()
    dtypes = _row_dtypes(table, files, dtype)
    plan = CheckpointPlan(table, sizes, dtypes)
    _require_memory(_largest_cut(plan, files), memory_bytes)
    new_files = [file.recast(_tensor_dtypes(table, dtypes)) for file in files]
    purpose = _purpose(source, tuple(file.name for file in files), dtype, asdict(sizes))
    total = sum(plan.sizes.values())
    with PartialFolder(target, purpose, lambda done: report(done, total)) as partial:
        for name in plan.files:
            partial.write(name, plan.bytes_of(name, folder, _warn))
        (partial.path / METADATA_FILE).write_bytes(plan.metadata())
        _write_common(partial.path, hf_config)
        _write_hf_part(partial.path / HF_PART, source, files, new_files)
        _verify_checkpoint(partial.path, table, dtypes, plan)
        check(partial.path)
        partial.finish()


def megatron_to_hf(
    checkpoint: Path,
    target: Path,
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
    report: Report = lambda done, total: None,
    check: Check = lambda folder: None,
) -> None:
    """Writes a checkpoint, or the newest of a run's folder, as a Hugging Face folder.

    Config, tokenizer and file names come from `source`, a Hugging Face folder; None: from what a
    conversion put into the checkpoint. Otherwise as `hf_to_megatron`.
    """
    dist, model_files = open_checkpoint(checkpoint, source)
    require_outside(target, dist.path, model_files)
    table = table_for(read_hf_config(model_files))
    dist.check(table)
    files = _plan_of(model_files, table)
    dtypes = {row: dtype or dist.dtype_of(row) for row in _exported(table)}
    new_files = [file.recast(_tensor_dtypes(table, dtypes)) for file in files]
    parts = parts_of(dist, table)
    _require_memory(_largest_tensor(new_files, parts), memory_bytes)
    purpose = _purpose(dist.path, (METADATA_FILE, *dist.file_names), dtype, {})
    purpose["files from"] = _stamps(model_files, ("config.json",))
    total = sum(file.size for file in new_files)
    with PartialFolder(target, purpose, lambda done: report(done, total)) as partial:
        for file in new_files:
            partial.write(file.name, _file_bytes(file, parts))
        _write_index(partial.path, model_files, files, new_files)
        changed = _main_dtype(new_files) if list(files) != new_files else None
        # The card of a model is not that of what was trained from it.
        carried = CONVERTED_TOO if model_files.parent == dist.path else CARRIED_OVER
        copy_model_files(model_files, partial.path, changed, carried)
        _verify_folder(partial.path, table, new_files)
        check(partial.path)
        partial.finish()


def open_checkpoint(path: Path, source: Path | None) -> tuple[DistCheckpoint, Path]:
    """The checkpoint at `path` (or the newest of a run there) and the folder of its model's files.

    Raises ValueError when that folder is not known, or is of another model than the run's.
    """
    dist = DistCheckpoint(find_checkpoint(path))
    own = dist.path / HF_PART
    if source is None and (own / HEADERS_FILE).is_file():
        return dist, own
    source = source or _source_of_run(dist.path)
    try:
        common = torch.load(dist.path / COMMON_FILE, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle fails in as many ways as it has bytes
        raise ValueError(f"{dist.path / COMMON_FILE} cannot be read ({error!r})") from error
    saved, given = common.get("hf_config"), read_hf_config(source)
    if saved is not None:
        # Written by every export anew, and without meaning for the weights.
        keys = (saved.keys() | given.keys()) - {"transformers_version", "dtype", "torch_dtype"}
        if differing := sorted(key for key in keys if saved.get(key) != given.get(key)):
            raise ValueError(
                f"{source} is another model than {dist.path} was saved from: config.json differs "
                f"in {', '.join(differing)}; give the run's model with --source"
            )
    return dist, source


def parts_of(dist: DistCheckpoint, table: Table) -> dict[str, Part]:
    """Every tensor of the Hugging Face folder, a tied head too, still in the checkpoint."""
    parts = {
        name: part
        for entry in table.entries()
        if entry.row.exported
        for name, part in zip(entry.hf_names(), dist.read(entry), strict=True)
    }
    return parts | {copy: parts[original] for copy, original in table.copies.items()}


def _source_of_run(checkpoint: Path) -> Path:
    config = checkpoint.parent.parent / "config.yaml"
    try:
        source = Path(yaml.safe_load(config.read_text())["model"]["path"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} does not say which model it is of; give the Hugging Face folder that "
            "the run started from with --source"
        ) from error
    if not source.is_dir():
        raise ValueError(f"{source}, model.path of {config}, is not here; give it with --source")
    return source


def _plan_of(model_files: Path, table: Table) -> tuple[TensorFile, ...]:
    """The safetensors files that a folder has or, in a converted checkpoint, had."""
    headers = model_files / HEADERS_FILE
    if not headers.is_file():
        folder = HFFolder(model_files)
        folder.check(table)
        return folder.plan()
    try:
        said = json.loads(headers.read_text())
        files = tuple(TensorFile.parse(name, header) for name, header in said.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{headers} is damaged ({error!r}); convert the model again") from error
    shapes = {name: place.shape for file in files for name, place in file.tensors.items()}
    expected = table.hf_shapes()
    copies = {copy: expected[of] for copy, of in table.copies.items() if copy in shapes}
    if shapes != expected | copies:
        raise ValueError(f"{headers} is not of the model in {model_files / 'config.json'}")
    return files


def _exported(table: Table) -> list[Row]:
    return [row for row in (*table.first, *table.layers, *table.last) if row.exported]


def _row_dtypes(
    table: Table, files: Sequence[TensorFile], dtype: torch.dtype | None
) -> dict[Row, torch.dtype]:
    """The dtype of each row: `dtype`, or the one that its tensors have in every layer."""
    if dtype is not None:
        return dict.fromkeys(_exported(table), dtype)
    stored = {name: place.dtype for file in files for name, place in file.tensors.items()}
    found: dict[Row, set[torch.dtype]] = {row: set() for row in _exported(table)}
    for entry in table.entries():
        if entry.row.exported:
            found[entry.row].update(stored[name] for name in entry.hf_names())
    for row, dtypes in found.items():
        if len(dtypes) > 1:
            raise ValueError(
                f"{row.hf[0].at('*', '*')} and what Megatron keeps with it have several dtypes, "
                f"{', '.join(sorted(map(str, dtypes)))}; choose one with --dtype"
            )
    return {row: dtypes.pop() for row, dtypes in found.items()}


def _tensor_dtypes(table: Table, dtypes: Mapping[Row, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype of every tensor of the folder."""
    by_name = {
        name: dtypes[entry.row]
        for entry in table.entries()
        if entry.row.exported
        for name in entry.hf_names()
    }
    return by_name | {copy: by_name[original] for copy, original in table.copies.items()}


def _main_dtype(files: Sequence[TensorFile]) -> torch.dtype:
    """The dtype of the largest part of a model's bytes."""
    sizes: dict[torch.dtype, int] = {}
    for place in (place for file in files for place in file.tensors.values()):
        sizes[place.dtype] = sizes.get(place.dtype, 0) + place.stop - place.start
    return max(sizes, key=lambda dtype: sizes[dtype])


def _largest_cut(plan: CheckpointPlan, files: Sequence[TensorFile]) -> tuple[int, str]:
    """The most memory that writing a checkpoint takes at once, and what takes it."""
    stored = {name: place.dtype for file in files for name, place in file.tensors.items()}
    needs = (
        (cut.copied_bytes(plan.dtypes[cut.entry.row], stored[name]), name)
        for cuts in plan.files.values()
        for cut in cuts
        for name in cut.entry.hf_names()[:1]
    )
    return max(needs)


def _largest_tensor(files: Sequence[TensorFile], parts: Mapping[str, Part]) -> tuple[int, str]:
    """The most memory that writing a folder takes at once, and what takes it."""
    needs = []
    for name, place in ((n, place) for file in files for n, place in file.tensors.items()):
        stored = parts[name].dtype
        sizes = {stored, place.dtype}  # put together as stored, then converted
        needs.append((sum(d.itemsize for d in sizes) * math.prod(place.shape), name))
    return max(needs)


def _require_memory(largest: tuple[int, str], ceiling: int | None) -> None:
    need, name = largest
    own = anonymous_memory()
    if ceiling is not None and own + need > ceiling:
        raise ValueError(
            f"--memory-gib: {ceiling / 2**30:.3g} GiB are too little: {name} takes "
            f"{need / 2**30:.3g} GiB at once and this process {own / 2**30:.3g} GiB without it; "
            f"allow {(own + need) / 2**30 * 1.1:.2g} GiB"
        )


def anonymous_memory() -> int:
    """Resident bytes of this process without mapped files, which the system takes back at need."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 2**10
    raise ValueError("/proc/self/status has no RssAnon; leave --memory-gib out on this system")


def _purpose(
    source: Path, files: Sequence[str], dtype: torch.dtype | None, layout: dict[str, int]
) -> dict[str, Any]:
    """What a conversion that goes on must have in common with the one that began."""
    return {
        "source": str(source.resolve()),
        "files": _stamps(source, files),
        "dtype": str(dtype),
        "layout": layout,
        "torch": torch.__version__,  # its records of objects may differ in length
    }


def _stamps(folder: Path, files: Sequence[str]) -> dict[str, list[int]]:
    stats = {name: (folder / name).stat() for name in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _write_common(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """What Megatron reads of a checkpoint beside tensors: 3.0 is its order of queries and keys."""
    common = {"checkpoint_version": 3.0, "iteration": 0, "hf_config": dict(hf_config)}
    torch.save(common, folder / COMMON_FILE)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / BACKEND_FILE).write_text(json.dumps(backend))


def _write_hf_part(
    folder: Path, source: Path, files: Sequence[TensorFile], new_files: Sequence[TensorFile]
) -> None:
    folder.mkdir()
    changed = _main_dtype(new_files) if list(files) != list(new_files) else None
    copy_model_files(source, folder, changed, CONVERTED_TOO)
    headers = {file.name: file.header for file in new_files}
    (folder / HEADERS_FILE).write_text(json.dumps(headers))
    _write_index(folder, source, files, new_files)


def _write_index(
    folder: Path, source: Path, files: Sequence[TensorFile], new_files: Sequence[TensorFile]
) -> None:
    """The source's own index while it still says the truth."""
    if list(files) == list(new_files):
        if (source / INDEX_FILE).is_file():
            shutil.copyfile(source / INDEX_FILE, folder / INDEX_FILE)
    elif len(new_files) > 1:
        (folder / INDEX_FILE).write_text(index_of(new_files))


def _file_bytes(file: TensorFile, parts: Mapping[str, Part]) -> Iterator[Bytes]:
    yield file.start
    for name, place in file.tensors.items():
        values = parts[name].tensor().to(place.dtype)
        _warn(name, values)
        yield memory_of(values)


def _warn(name: str, values: Tensor) -> None:
    """Bytes are kept whatever they are: it is training that refuses such a model."""
    if problem := strange_values(values):
        print(f"warning: {name} {problem}, which no weight of a model is", file=sys.stderr)


def _verify_checkpoint(
    folder: Path, table: Table, dtypes: Mapping[Row, torch.dtype], plan: CheckpointPlan
) -> None:
    """Reads what was written back: every name, shape, dtype and size."""
    written = DistCheckpoint(folder)
    written.check(table)
    sizes = {name: (folder / name).stat().st_size for name in written.file_names}
    wrong = [row.hf[0].name for row, dtype in dtypes.items() if written.dtype_of(row) != dtype]
    _plan_of(folder / HF_PART, table)
    if wrong or sizes != plan.sizes:
        raise ValueError(f"{folder}: what was written is not what was planned: {wrong or sizes}")


def _verify_folder(folder: Path, table: Table, files: Sequence[TensorFile]) -> None:
    """Reads what was written back: every name, shape, dtype and size."""
    written = HFFolder(folder)
    written.check(table)
    sizes = {file.name: (folder / file.name).stat().st_size for file in files}
    if list(written.plan()) != list(files) or sizes != {file.name: file.size for file in files}:
        raise ValueError(f"{folder}: what was written is not what was planned: {sizes}")
