"""What a folder holds is looked at before it is trained, by every rank in its own part."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasd.policy import load
from megasd.policy.config import ModelConfig
from megasd.testing.tiny import tiny_qwen3
from megasd.weights.layout import Sizes

NORM = "model.norm.weight"
KEYS = "model.layers.0.self_attn.k_proj.weight"


class Model(torch.nn.Module):
    """Two of the parameters of the last rank's model, under the names that Megatron has."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = {
            "decoder.layers.0.self_attention.linear_qkv.weight": (64, 32),
            "decoder.final_layernorm.weight": (32,),
        }

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return ((name, torch.nn.Parameter(torch.empty(s))) for name, s in self.shapes.items())


LAYOUT: Any = SimpleNamespace(
    tp_rank=1, tp_size=2, pp_rank=0, pp_size=1, ep_rank=0, ep_size=1, etp_rank=0, sizes=Sizes(tp=2)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path, tie=False)


def load_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "build_model", lambda *_: Model())
    load.load_model(folder, ModelConfig(dtype="float32"), LAYOUT, cast(Any, None))


def change(folder: Path, of: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    of(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "row", "value", "problem"),
    [
        (NORM, 0, float("nan"), f"{NORM} holds NaN"),
        (KEYS, -1, float("inf"), f"{KEYS} holds infinity"),
        (KEYS, -1, 1e30, f"{KEYS} holds 1e\\+30"),
    ],
)
def test_a_weight_that_no_model_has_is_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    row: int,
    value: float,
    problem: str,
) -> None:
    load_from(folder, monkeypatch)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][row] = value

    change(folder, spoil)
    with pytest.raises(ValueError, match=rf"^model\.path: .*: {problem}, which no weight"):
        load_from(folder, monkeypatch)


def test_a_config_that_asks_for_another_model_is_never_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match='hidden_act: "gelu"'):
        load_from(folder, monkeypatch)
