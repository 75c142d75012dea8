"""Hugging Face folders: only slices are read, every defect is named, no export is half there."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megasd.process.errors import TryAgainError
from megasd.testing.tiny import tiny_qwen3
from megasd.weights.hf_folder import HFFolder, load_parameter, read_hf_config, write_hf_folder
from megasd.weights.layout import local_shape
from megasd.weights.tables import table_for
from megasd.weights.tables.table import Table

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def table_of(folder: Path) -> Table:
    return table_for(read_hf_config(folder))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    parts = [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: tensor for part in parts for name, tensor in part.items()}


def with_tensors(folder: Path, changed: dict[str, Tensor | None]) -> HFFolder:
    """`folder` with some of its tensors replaced (None: removed)."""
    tensors = tensors_of(folder) | changed
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return HFFolder(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "model", layers=2, norm_spread=0.2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "sharded", layers=2, tie=False, max_shard_size="20KB")


def test_each_rank_gets_its_part_of_every_parameter_in_the_dtype_asked_for(sharded: Path) -> None:
    table, hf, full = table_of(sharded), HFFolder(sharded), tensors_of(sharded)
    hf.check(table)
    entry = table.find("decoder.layers.1.mlp.linear_fc1.weight")
    gate, up = (full[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    half = len(gate) // 2
    local = load_parameter(hf, entry, rank=1, ways=2, dtype=torch.bfloat16)
    assert torch.equal(local, torch.cat([gate[half:], up[half:]]).bfloat16())


def test_padding_rows_of_the_vocabulary_are_zero(folder: Path) -> None:
    entry = table_of(folder).find("embedding.word_embeddings.weight")
    full = tensors_of(folder)[EMBEDDING]
    ranks = next(n for n in (2, 3, 5, 7) if len(full) % n)
    last = load_parameter(HFFolder(folder), entry, ranks - 1, ranks, torch.float32)
    assert last.shape == local_shape(entry.row, ranks)
    padding = -len(full) % ranks
    assert torch.equal(last[: len(last) - padding], full[-(len(last) - padding) :])
    assert not last[len(last) - padding :].any()


def test_every_wrong_tensor_is_listed_with_its_file(folder: Path) -> None:
    hf = with_tensors(
        folder,
        {
            NORM: None,
            "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3),
            "model.layers.0.mlp.up_proj.bias": torch.zeros(3),
        },
    )
    with pytest.raises(ValueError, match=r"does not hold the model of its config\.json") as error:
        hf.check(table_of(folder))
    for defect in (
        "model.norm.weight is missing",
        "up_proj.weight in model.safetensors has shape (3, 3) instead of (64, 32)",
        "up_proj.bias in model.safetensors is not a tensor of qwen3",
    ):
        assert defect in str(error.value)


def test_a_tied_head_stored_twice_is_accepted_only_when_both_are_the_same(folder: Path) -> None:
    embedding = tensors_of(folder)[EMBEDDING]
    with_tensors(folder, {"lm_head.weight": embedding.clone()}).check(table_of(folder))
    hf = with_tensors(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="set tie_word_embeddings: false"):
        hf.check(table_of(folder))


def test_a_file_of_the_index_that_is_absent_cut_short_or_another_is_named(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{files[1].name} is cut short or damaged"):
        HFFolder(sharded)
    files[1].write_bytes(b"")
    with pytest.raises(ValueError, match=f"{files[1].name} is cut short or damaged"):
        HFFolder(sharded)
    shutil.copyfile(files[0], files[1])
    with pytest.raises(ValueError, match=f"names tensors that are not there: .* {files[1].name}"):
        HFFolder(sharded)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name} does not exist although"):
        HFFolder(sharded)


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        HFFolder(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_hf_config(tmp_path)


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model(torch.arange(10)[None]).logits


@pytest.mark.parametrize("source", ["folder", "sharded"])  # a tied head, an untied one
def test_the_source_s_own_tensors_in_any_order_become_its_files_again(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, target = request.getfixturevalue(source), tmp_path / "export" / "hf"
    tensors = tensors_of(folder)
    write_hf_folder(target, reversed(tensors.items()), folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = json.loads(files.pop(INDEX, b"{}"))
    assert {p.name: p.read_bytes() for p in target.iterdir() if p.name != INDEX} == files
    assert json.loads((target / INDEX).read_text() if index else "{}") == index
    assert [path.name for path in target.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize("source", ["folder", "sharded"])
def test_transformers_loads_what_was_written_and_answers_the_same(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, target = request.getfixturevalue(source), tmp_path / "hf"
    other = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    write_hf_folder(target, other.items(), folder)  # headers of its own: the dtype is another
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(target), expected(torch.arange(10)[None]).logits)
    messages = [{"role": "user", "content": "1 + 2"}]
    ids, said = (
        AutoTokenizer.from_pretrained(f).apply_chat_template(messages) for f in (target, folder)
    )
    assert ids == said
    names = sorted(path.name for path in target.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())


def test_the_config_names_the_dtype_that_was_written(folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    write_hf_folder(tmp_path / "hf", tensors.items(), folder)
    config, source = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "hf", folder)
    )
    assert config == source | {"dtype": "bfloat16"}


def _disk_full(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != NORM}.items(), f"{NORM} is missing"),
        (lambda t: (t | {NORM: torch.zeros(3)}).items(), f"{NORM} has shape"),
        (lambda t: (t | {NORM: t[NORM].half()}).items(), r"dtype torch.float16 instead of"),
        (lambda t: (t | {"extra": torch.zeros(3)}).items(), "extra is not among the tensors"),
        (lambda t: {}.items(), "there are no tensors to write"),
    ],
)
def test_a_failed_write_leaves_no_target_and_no_rubbish(
    folder: Path, tmp_path: Path, stream: Any, message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        write_hf_folder(tmp_path / "hf", stream(tensors_of(folder)), folder)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_may_have_room_later_and_leaves_no_target_and_no_rubbish(
    folder: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TryAgainError, match=r"could not be written .*No space left"):
        write_hf_folder(tmp_path / "hf", _disk_full(tensors_of(folder)), folder)
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_that_holds_something_is_never_touched(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    write_hf_folder(target, tensors_of(folder).items(), folder)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        write_hf_folder(target, tensors_of(folder).items(), folder)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
