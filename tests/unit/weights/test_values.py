"""Numbers that no weight of a model is: a conversion keeps them and says so; targets in sources."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasd.testing.tiny import tiny_qwen3
from megasd.weights.conversion import hf_to_megatron, megatron_to_hf
from megasd.weights.hf_folder import write_hf_folder
from megasd.weights.layout import Sizes
from megasd.weights.values import strange_values

FILE = "model.safetensors"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
QUERIES = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("value", "dtype", "problem"),
    [
        (float("nan"), torch.bfloat16, "holds NaN"),
        (float("-inf"), torch.float32, "holds infinity"),
        (1e30, torch.bfloat16, "holds 1e+30"),
        (-70_000.0, torch.float32, "holds -7e+04"),
        (-65_504.0, torch.float16, None),
        (0.0, torch.bfloat16, None),
    ],
)
def test_one_value_is_enough(value: float, dtype: torch.dtype, problem: str | None) -> None:
    tensor = torch.linspace(-2, 2, 35).view(5, 7).to(dtype)
    assert strange_values(tensor) is None
    tensor[3, 1] = value
    assert strange_values(tensor) == problem


def test_a_conversion_warns_of_them_and_keeps_their_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_qwen3(tmp_path / "source")
    tensors = load_file(source / FILE)
    tensors[NORM][3] = float("nan")
    tensors[UP][0, 0] = -1e30
    tensors[QUERIES][0, 0] = float("inf")
    save_file(tensors, source / FILE, {"format": "pt"})
    capsys.readouterr()
    hf_to_megatron(source, tmp_path / "megatron", Sizes(tp=2))
    said = capsys.readouterr().err
    assert f"warning: {NORM} holds NaN, which no weight of a model is\n" in said
    assert f"warning: {UP} holds -1e+30, " in said
    assert f"warning: {QUERIES} or " in said
    assert said.count("\n") == 3
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    warned = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert sorted(warned) == sorted([NORM, UP, QUERIES])
    assert (tmp_path / "hf" / FILE).read_bytes() == (source / FILE).read_bytes()


def test_nothing_is_written_into_what_it_is_made_from(tmp_path: Path) -> None:
    source, checkpoint = tiny_qwen3(tmp_path / "source"), tmp_path / "megatron"
    with pytest.raises(ValueError, match=r"lies inside .*; choose another"):
        hf_to_megatron(source, source / "new", Sizes())
    with pytest.raises(ValueError, match=r"lies inside .*; choose another"):
        write_hf_folder(source / "new", load_file(source / FILE).items(), source)
    hf_to_megatron(source, checkpoint, Sizes())
    before = sorted(tmp_path.rglob("*"))
    for target, model in (
        (checkpoint / "hf" / "new", None),
        (source / ".." / "megatron" / "new", None),
        (source / "new", source),
    ):
        with pytest.raises(ValueError, match=r"lies inside .*; choose another"):
            megatron_to_hf(checkpoint, target, source=model)
    assert sorted(tmp_path.rglob("*")) == before
