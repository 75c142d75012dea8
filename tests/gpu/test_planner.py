"""The planner's lists of what Transformer Engine's layers save, and its peak, against a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megasd.planner.activations import (
    Cut,
    gather_buffer,
    kept_on_stage,
    last_norm_going_backward,
    last_norm_saved,
    layers_going_backward,
)
from megasd.planner.buffers import held_bytes
from megasd.planner.model import Model
from megasd.policy.config import ParallelConfig
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.weights.hf_folder import read_hf_config
from tests.distributed import planner_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES: dict[str, Any] = {
    "vocab": 1024,
    "hidden": 1024,
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 128,
    "intermediate": 3072,
    "max_position_embeddings": 8192,
    "tie": False,
}
COUNT, LENGTH = 4, 2048


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "dense":
        return tiny_qwen3(path, **SIZES)
    return tiny_qwen3_moe(path, experts=8, moe_intermediate=768, **SIZES)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_forward_on_a_gpu_saves_what_the_planner_counts_and_peaks_where_it_says(
    recompute: str, folder: Path, one_rank: Any
) -> None:
    """10% of the saved tensors, and of the peak of a forward and a backward pass."""
    model = Model.of(read_hf_config(folder))
    settings = {"device": "cuda", "dtype": "bfloat16", "recompute": recompute}
    before = torch.cuda.memory_allocated()
    (saved,), peak = cases.saved_and_peak(folder, settings, [(COUNT, LENGTH)])
    cut = Cut(
        model=model,
        parallel=ParallelConfig(),
        tokens=COUNT * LENGTH,
        longest=LENGTH,
        dtype_bytes=2,
        engine="transformer_engine" if one_rank.transformer_engine else "local",
    )
    is_full = recompute == "full"
    kept = kept_on_stage(cut, stage=0, recompute=is_full, in_flight=1)
    planned_saved = kept + last_norm_saved(cut)
    held = held_bytes(model, ParallelConfig(), world_size=1, stage=0, dtype_bytes=2)
    standing = held.weights + held.gradients + held.optimizer + gather_buffer(cut)
    working = max(last_norm_going_backward(cut), layers_going_backward(cut, recompute=is_full))
    planned_peak = standing + kept + working
    name = f"{folder.name.rstrip('0123456789')} {recompute}"
    ratios = {"saved": planned_saved / saved, "peak": planned_peak / (peak - before)}
    figures = {f"{name}: planned / {key}": round(value, 3) for key, value in ratios.items()}
    print("FIGURES " + json.dumps(figures))
    assert planned_saved == pytest.approx(saved, rel=0.1)
    assert planned_peak == pytest.approx(peak - before, rel=0.1)
