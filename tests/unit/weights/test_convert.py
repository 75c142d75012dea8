"""Conversion: there and back gives the same bytes, nothing wrong passes, a killed one goes on."""

import ctypes
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_hf_to_megatron
import convert_megatron_to_hf
import inspect_checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megasd.process.errors import TryAgainError
from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from megasd.weights.conversion import anonymous_memory, hf_to_megatron, megatron_to_hf
from megasd.weights.dist_checkpoint import DistCheckpoint
from megasd.weights.layout import Sizes

MODELS: dict[str, Callable[..., Path]] = {
    "qwen3": lambda folder: tiny_qwen3(folder, vocab=121, tie=True),
    "qwen3 in files": lambda folder: tiny_qwen3(folder, tie=False, max_shard_size="20KB"),
    "qwen3_moe": lambda folder: tiny_qwen3_moe(folder, max_shard_size="40KB"),
    "llama": lambda folder: tiny_llama(folder, tie=False),
}
LAYOUTS = {
    "TP1": Sizes(),
    "TP2 PP2": Sizes(tp=2, pp=2),
    "PP2 EP2": Sizes(pp=2, ep=2),
    "TP2 EP4": Sizes(tp=2, ep=4),
    "EP2 ETP2": Sizes(ep=2, etp=2),
    "PP2": Sizes(pp=2),
}
DENSE, MOE = ("TP1", "TP2 PP2", "PP2"), ("TP1", "TP2 PP2", "PP2 EP2", "TP2 EP4", "EP2 ETP2")
NORM = "model.norm.weight"
FILES = "model.safetensors"


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, `.metadata` and the like included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: make(folder / name) for name, make in MODELS.items()}
    (made["llama"] / "README.md").write_text("a model card")
    return made


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *((model, layout) for model in ("qwen3", "qwen3 in files", "llama") for layout in DENSE),
        *(("qwen3_moe", layout) for layout in MOE),
    ],
)
def test_there_and_back_every_file_has_the_same_bytes(
    model: str, layout: str, models: dict[str, Path], tmp_path: Path
) -> None:
    source = models[model]
    sizes = LAYOUTS[layout]
    hf_to_megatron(source, tmp_path / "megatron", sizes)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert content(tmp_path / "hf") == content(source)
    ranks = max(sizes.tp, sizes.ep * sizes.etp) * sizes.pp
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == ranks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_a_tied_head_that_is_stored_twice_comes_back(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(models["qwen3"], tmp_path / "source")
    tensors = load_file(source / FILES)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / FILES, {"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron", Sizes(tp=2))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert content(tmp_path / "hf") == content(source)


@pytest.mark.parametrize("first", [True, False])
def test_another_dtype_is_that_of_tensors_headers_index_and_config(
    first: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    source, target = models["qwen3 in files"], tmp_path / "hf"
    dtypes = (torch.bfloat16, None) if first else (None, torch.bfloat16)
    hf_to_megatron(source, tmp_path / "megatron", Sizes(pp=2), dtype=dtypes[0])
    megatron_to_hf(tmp_path / "megatron", target, dtype=dtypes[1])
    for file in source.glob("*.safetensors"):
        expected = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        torch.testing.assert_close(load_file(target / file.name), expected, rtol=0, atol=0)
    read = (json.loads((f / "config.json").read_text()) for f in (target, source))
    assert next(read) == next(read) | {"dtype": "bfloat16"}
    index, before = (json.loads((f / f"{FILES}.index.json").read_text()) for f in (target, source))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]


@pytest.mark.parametrize("layout", ["TP1", "TP2 PP2"])
def test_a_parameter_above_the_largest_record_is_cut_into_rows(
    layout: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megasd.weights.dist_writer.LARGEST_RECORD", 1000)
    hf_to_megatron(models["qwen3"], tmp_path / "megatron", LAYOUTS[layout])
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert content(tmp_path / "hf") == content(models["qwen3"])


def test_a_rank_of_the_layout_finds_its_slices_in_its_own_file(
    models: dict[str, Path], tmp_path: Path
) -> None:
    hf_to_megatron(models["qwen3_moe"], tmp_path / "m", Sizes(tp=2, pp=2, ep=4))
    chunks = DistCheckpoint(tmp_path / "m").chunks
    up = chunks["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    qkv = chunks["decoder.layers.self_attention.linear_qkv.weight"]
    assert {(*c.offsets[:2], c.file) for c in up} == {
        (stage, expert, f"__{4 * stage + expert}_0.distcp")
        for stage in (0, 1)
        for expert in range(4)
    }
    assert {(c.offsets[0], c.offsets[1] > 0, c.file) for c in qkv} == {
        (stage, rank > 0, f"__{4 * stage + rank}_0.distcp") for stage in (0, 1) for rank in (0, 1)
    }


# ---- what is wrong ends in one sentence and leaves the target as it was


def run_tool(tool: Any, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    try:
        tool.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


Tensors = dict[str, Tensor]


def _rewrite(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        save_file(change(load_file(folder / FILES)), folder / FILES, {"format": "pt"})

    return broken


def _cut(name: str, size: int) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return broken


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_rewrite(lambda t: {k: v for k, v in t.items() if k != NORM}), f"{NORM} is miss"),
    "extra": (_rewrite(lambda t: t | {"extra": torch.zeros(1)}), "extra in model.safetensors is"),
    "shape": (_rewrite(lambda t: t | {NORM: torch.zeros(3)}), "has shape (3,) instead of (32,)"),
    "dtypes": (
        _rewrite(
            lambda t: t | {k: v.half() for k, v in t.items() if k.endswith("0.mlp.up_proj.weight")}
        ),
        "choose one with --dtype",
    ),
    "integers": (_rewrite(lambda t: t | {NORM: t[NORM].char()}), "only F32, F16, BF16"),
    "cut short": (_cut(FILES, 5000), "model.safetensors is cut short or damaged"),
    "fp8": (_rewrite(lambda t: t | {NORM: t[NORM].to(torch.float8_e4m3fn)}), "dtype F8_E4M3; only"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
}


@pytest.mark.parametrize("wrong", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused(
    wrong: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = shutil.copytree(models["qwen3"], tmp_path / "source")
    (tmp_path / "empty").mkdir()
    breaks, sentence = WRONG_FOLDERS[wrong]
    breaks(source)
    for target in ("new", "empty"):
        code = run_tool(convert_hf_to_megatron, source, tmp_path / target, monkeypatch=monkeypatch)
        said = capsys.readouterr().err
        assert (code, said.count("\n"), "Traceback" in said) == (2, 1, False)
        assert sentence in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]
    assert not any((tmp_path / "empty").iterdir())
    if wrong not in ("dtypes",):  # several dtypes are no fault of the folder
        assert run_tool(inspect_checkpoint, source, monkeypatch=monkeypatch) == 1
        assert "problem: " in capsys.readouterr().out


def _change_metadata(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        file = folder / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        change(metadata)
        file.write_bytes(pickle.dumps(metadata))

    return broken


FINAL = "decoder.final_layernorm.weight"


def _add(metadata: Any) -> None:
    stored = metadata.state_dict_metadata[FINAL]
    metadata.state_dict_metadata["extra"] = stored
    place = metadata.storage_data[MetadataIndex(FINAL, (0,))]
    metadata.storage_data[MetadataIndex("extra", (0,))] = place


def _reshape(metadata: Any) -> None:
    old: TensorStorageMetadata = metadata.state_dict_metadata[FINAL]
    old.size = torch.Size((3,))


def _uncover(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()


def _flip(folder: Path) -> None:
    """One bit in the numbers of the first record of a tensor."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = metadata.storage_data[MetadataIndex("embedding.word_embeddings.weight", (0, 0))]
    data = bytearray((folder / place.relative_path).read_bytes())
    data[place.offset + place.length // 2] ^= 1
    (folder / place.relative_path).write_bytes(data)


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        _change_metadata(lambda m: m.state_dict_metadata.pop(FINAL)),
        f"{FINAL} is missing",
    ),
    "extra": (_change_metadata(_add), "extra is not a tensor of qwen3"),
    "shape": (_change_metadata(_reshape), f"{FINAL} has shape (3,) instead of (32,)"),
    "chunk lost": (_change_metadata(_uncover), "linear_fc2.weight do not cover it"),
    "cut short": (_cut("__1_0.distcp", 5000), "__1_0.distcp is cut short: it has 5000 bytes of"),
    "file lost": (lambda folder: (folder / "__1_0.distcp").unlink(), "does not exist although"),
    "metadata cut": (_cut(".metadata", 900), ".metadata is cut short or damaged"),
    "bit flipped": (_flip, "do not have their checksum"),
    "headers cut": (_cut("hf/safetensors_headers.json", 90), "is damaged"),
}


@pytest.fixture(scope="module")
def checkpoint(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoint") / "megatron"
    hf_to_megatron(models["qwen3"], target, Sizes(tp=2, pp=2))
    return target


@pytest.mark.parametrize("wrong", WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused(
    wrong: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    breaks, sentence = WRONG_CHECKPOINTS[wrong]
    breaks(source)
    code = run_tool(convert_megatron_to_hf, source, tmp_path / "hf", monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert (code, said.count("\n"), "Traceback" in said) == (2, 1, False)
    assert sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    if wrong != "headers cut":
        code = run_tool(inspect_checkpoint, source, "--checksums", monkeypatch=monkeypatch)
        assert code == 1
        assert sentence in capsys.readouterr().out


def test_options_that_cannot_be_met_are_refused_before_anything_is_written(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    for target, options, sentence in (
        (full, (), "exists and is not an empty folder"),
        (tmp_path / "new", ("--tp", 3), "error: --tp: 3 does not divide 2, key-value heads"),
        (tmp_path / "new", ("--pp", 4), "4 stages do not divide the model's 2 layers"),
        (tmp_path / "new", ("--ep", 2), "2 does not divide the 0 experts"),
        (tmp_path / "new", ("--etp", 2), "error: --etp: 2 ranks would share an expert, and qwen3"),
        (models["qwen3"] / "new", (), "lies inside"),
        (tmp_path / "new", ("--memory-gib", 0.01), "0.01 GiB are too little: model."),
    ):
        arguments = (models["qwen3"], target, *options)
        assert run_tool(convert_hf_to_megatron, *arguments, monkeypatch=monkeypatch) == 2
        assert sentence in capsys.readouterr().err
    assert content(tmp_path) == {"full/mine": b"keep"}
    assert not (models["qwen3"] / "new").exists()


@pytest.mark.parametrize("first_file_fits", [False, True])
def test_a_full_disk_costs_the_conversion_and_nothing_else(
    first_file_fits: bool,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A limit on the size of files stands for the disk: the last stage's is the larger one."""
    tool, target = convert_hf_to_megatron, tmp_path / "megatron"
    arguments = (models["llama"], target, "--pp", 2)
    assert run_tool(tool, *arguments, monkeypatch=monkeypatch) == 0
    sizes = [(target / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert sizes[0] < sizes[1]
    expected = content(target)
    shutil.rmtree(target)
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = sizes[0] if first_file_fits else sizes[0] - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        code = run_tool(tool, *arguments, monkeypatch=monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert (code, said.count("\n"), target.exists()) == (2, 1, False)
    assert "could not be written (File too large)" in said
    assert ("1 complete files are kept" in said) is first_file_fits
    assert any(tmp_path.iterdir()) is first_file_fits
    assert run_tool(tool, *arguments, monkeypatch=monkeypatch) == 0
    assert content(target) == expected


# ---- killed, and gone on with


def _killed_after(num_bytes: int, convert: Callable[..., None], *args: Any) -> bool:
    """Whether a process that converts was killed (-9) once it had written so much."""
    child = os.fork()
    if child == 0:
        written = 0

        def report(done: int, total: int) -> None:
            nonlocal written
            written += done
            if written > num_bytes:
                os.kill(os.getpid(), signal.SIGKILL)

        convert(*args, report=report)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_conversion_killed_at_any_point_goes_on_and_gives_the_same_bytes(
    direction: str, models: dict[str, Path], tmp_path: Path
) -> None:
    source, target = models["qwen3_moe"], tmp_path / "target"
    expected, arguments = tmp_path / "expected", (Sizes(tp=2, pp=2, ep=2),)
    convert: Callable[..., None] = hf_to_megatron
    if direction == "to hf":
        hf_to_megatron(source, tmp_path / "megatron", *arguments)
        source, convert, arguments = tmp_path / "megatron", megatron_to_hf, ()
    convert(source, expected, *arguments)
    total = sum(len(data) for data in content(expected).values())
    partial = tmp_path / ".target.partial"
    draw = torch.Generator().manual_seed(0)
    for start in (0.0, 0.3, 0.6):  # the same partial folder is killed three times
        point = int(total * (start + 0.3 * torch.rand((), generator=draw).item()))
        if not _killed_after(point, convert, source, target, *arguments):
            assert start == 0.6, "what was complete counts as written"
        assert not target.exists()
    kept = {path.name: path.stat().st_ino for path in partial.glob("*-of-*")}
    kept |= {path.name: path.stat().st_ino for path in partial.glob("*.distcp")}
    complete = json.loads((partial / "journal.json").read_text())["files"]
    assert complete
    with pytest.raises(ValueError, match=r"was begun from something else .*dtype differ"):
        convert(source, target, *arguments, dtype=torch.bfloat16)
    damaged = min(complete)
    data = bytearray((partial / damaged).read_bytes())
    data[-1] ^= 1
    (partial / damaged).write_bytes(data)  # its checksum says so: written again
    convert(source, target, *arguments)
    assert content(target) == content(expected)
    for name in complete.keys() - {damaged}:
        assert (target / name).stat().st_ino == kept[name], f"{name} was complete"


def test_two_conversions_cannot_write_the_same_target(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source, target = models["llama"], tmp_path / "target"

    def another(folder: Path) -> None:
        with pytest.raises(TryAgainError, match=r"is being written by process \d+ on "):
            hf_to_megatron(source, target, Sizes())

    hf_to_megatron(source, target, Sizes(), check=another)
    assert target.is_dir()


# ---- memory, the probe, what inspection says


def _trimmed_memory() -> int:
    """Memory in use once the C library has given back what is free: new needs then show."""
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_memory()


def test_memory_stays_below_two_of_the_largest_tensors(tmp_path: Path) -> None:
    source = tiny_qwen3(
        tmp_path / "source", hidden=512, layers=6, heads=8, kv_heads=4, head_dim=64,
        intermediate=2048,
    )  # fmt: skip
    total, largest = (source / FILES).stat().st_size, 2048 * 512 * 4
    assert total > 24 * largest / 1.5
    before = peak = 0

    def report(done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous_memory())

    for convert in (
        lambda: hf_to_megatron(source, tmp_path / "m", Sizes(tp=2, pp=2), report=report),
        lambda: megatron_to_hf(tmp_path / "m", tmp_path / "hf", report=report),
    ):
        before = peak = anonymous_memory()
        convert()
        print(peak - before, largest)
        assert peak - before < 2 * largest, (peak, before)


def test_the_probe_compares_logits_and_the_result_is_described(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    megatron, hf = tmp_path / "megatron", tmp_path / "hf"
    for tool, *arguments in (
        (convert_hf_to_megatron, models["qwen3_moe"], megatron, "--ep", 2),
        (convert_megatron_to_hf, megatron, hf),
    ):
        assert run_tool(tool, *arguments, "--verify-logits", monkeypatch=monkeypatch) == 0
        assert "logits differ by at most 0" in capsys.readouterr().out
    for folder, files in ((megatron, 2), (hf, len(list(hf.glob("*.safetensors"))))):
        assert run_tool(inspect_checkpoint, folder, "--tensors", monkeypatch=monkeypatch) == 0
        said = capsys.readouterr().out
        tensors = [load_file(file) for file in models["qwen3_moe"].glob("*.safetensors")]
        count = sum(tensor.numel() for part in tensors for tensor in part.values())
        assert "family: qwen3_moe" in said
        assert f"files: {files}, " in said
        assert "no problems found" in said
        if folder == hf:
            assert f"parameters: {count:,}" in said
            assert "model.layers.1.mlp.experts.3.down_proj.weight" in said


def test_a_probe_that_differs_refuses_the_target(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(convert_hf_to_megatron, "folder_logits", lambda folder: torch.zeros(1))
    arguments = (models["llama"], tmp_path / "megatron", "--verify-logits")
    assert run_tool(convert_hf_to_megatron, *arguments, monkeypatch=monkeypatch) == 2
    assert "the converted model answers differently" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
