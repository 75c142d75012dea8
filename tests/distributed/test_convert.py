"""Megatron loads what was converted, in any layout; what training saved converts as it exports."""

from pathlib import Path

import convert_megatron_to_hf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.weights.conversion import hf_to_megatron, megatron_to_hf
from megasd.weights.layout import Sizes
from tests.distributed import convert_cases as cases
from tests.unit.weights.test_convert import content, run_tool

DENSE = {"tensor": 2, "pipeline": 2, "sequence": True}
MOE = {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}
MAKE = {
    "qwen3": lambda folder, seed: tiny_qwen3(
        folder, seed=seed, vocab=121, tie=False, norm_spread=0.2
    ),
    "qwen3_moe": lambda folder, seed: tiny_qwen3_moe(folder, seed=seed, vocab=121, norm_spread=0.2),
}


@pytest.mark.parametrize(
    ("model", "settings", "world_size", "layouts"),
    [
        ("qwen3", {}, 1, (Sizes(), Sizes(tp=2, pp=2))),
        ("qwen3", DENSE, 4, (Sizes(), Sizes(tp=2, pp=2), Sizes(tp=2))),
        ("qwen3_moe", MOE, 2, (Sizes(), Sizes(tp=2, ep=2), Sizes(pp=2, ep=4), Sizes(etp=2))),
    ],
)
def test_a_converted_checkpoint_loads_in_every_layout(
    model: str,
    settings: dict,
    world_size: int,
    layouts: tuple[Sizes, ...],
    tmp_path: Path,
    ranks: Ranks,
) -> None:
    source, other = (MAKE[model](tmp_path / str(seed), seed) for seed in (0, 1))
    runs = [tmp_path / f"run{number}" for number in range(len(layouts))]
    for run, sizes in zip(runs, layouts, strict=True):
        hf_to_megatron(source, run / "checkpoints" / "step_000000", sizes)
    expected, before = (
        {name: tensor.numpy() for name, tensor in load_file(f / "model.safetensors").items()}
        for f in (source, other)
    )
    first, *read = ranks.run(cases.read_converted, other, runs, settings, world_size=world_size)[0]
    np.testing.assert_equal(first, before)
    for sizes, weights in zip(layouts, read, strict=True):
        np.testing.assert_equal(weights, expected, err_msg=str(sizes))


@pytest.mark.parametrize(("model", "settings"), [("qwen3", DENSE), ("qwen3_moe", MOE)])
def test_a_checkpoint_of_training_converts_to_the_folder_that_is_exported(
    model: str,
    settings: dict,
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, run = MAKE[model](tmp_path / "source", 0), tmp_path / "run"
    settings = settings | {"dtype": "bfloat16", "teacher": {"weights": "ema", "decay": 0.5}}
    ranks.run(cases.save_and_export, source, run, settings, world_size=4)
    arguments = (run, tmp_path / "hf")
    assert run_tool(convert_megatron_to_hf, *arguments, monkeypatch=monkeypatch) == 2
    assert "--source" in capsys.readouterr().err, "the run's config.yaml is not there"
    (run / "config.yaml").write_text(f"model:\n  path: {source}\n")
    assert run_tool(convert_megatron_to_hf, *arguments, monkeypatch=monkeypatch) == 0
    assert content(tmp_path / "hf") == content(run / "hf")
    megatron_to_hf(run, tmp_path / "wide", source=source, dtype=torch.float32)
    narrow, wide = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "wide"))
    torch.testing.assert_close(wide, {k: v.float() for k, v in narrow.items()}, rtol=0, atol=0)
    other = MAKE[model](tmp_path / "other", 0)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"rope_theta"', '"rope_thetas"'))
    with pytest.raises(ValueError, match=r"config\.json differs in rope_parameters; give the"):
        megatron_to_hf(run, tmp_path / "new", source=other)
