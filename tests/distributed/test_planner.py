"""The planner's bytes are those of the real model: held exactly, saved within a few per cent."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megasd.planner.activations import Cut, layer_saved, layer_working, saved_on_stage
from megasd.planner.buffers import held_bytes
from megasd.planner.model import Model
from megasd.policy.config import ParallelConfig
from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.weights.hf_folder import read_hf_config
from tests.distributed import planner_cases as cases

LAYOUTS = {
    "dense": [
        (1, {"dtype": "float32"}),
        (3, {}),
        (4, {"tensor": 2}),
        (4, {"pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2, "dtype": "float32"}),
    ],
    "tied": [(2, {}), (4, {"pipeline": 2})],
    "experts": [
        (2, {}),
        (2, {"tensor": 2, "sequence": True}),
        (4, {"expert": 2}),
        (4, {"tensor": 2, "sequence": True, "expert": 2}),
        (4, {"tensor": 2, "sequence": True, "expert_tensor": 1}),
        (4, {"pipeline": 2, "expert": 2, "dtype": "float32"}),
    ],
}
CUTS = {field.name for field in dataclasses.fields(ParallelConfig)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Sizes that are no multiples of 64, a vocabulary that TP pads: every filling shows."""
    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"hidden": 72, "heads": 6, "head_dim": 20, "intermediate": 116}
    odd: dict[str, Any] = {**sizes, "vocab": 125, "layers": 2}
    return {
        "dense": tiny_qwen3(root / "dense", tie=False, **odd),
        "tied": tiny_qwen3(root / "tied", **odd),
        "experts": tiny_qwen3_moe(root / "experts", experts=8, moe_intermediate=56, **odd),
    }


def parallel_of(settings: Mapping[str, Any]) -> ParallelConfig:
    return ParallelConfig(**{key: value for key, value in settings.items() if key in CUTS})


@pytest.mark.parametrize(
    ("model", "world_size", "settings"),
    [(model, *layout) for model, layouts in LAYOUTS.items() for layout in layouts],
)
def test_weights_gradients_and_optimizer_are_megatrons_to_the_byte(
    model: str,
    world_size: int,
    settings: dict[str, Any],
    folders: Mapping[str, Path],
    ranks: Ranks,
) -> None:
    settings = {"dtype": "bfloat16", **settings}
    found = ranks.run(cases.held_by_megatron, folders[model], settings, world_size=world_size)
    sizes = Model.of(read_hf_config(folders[model]))
    for rank in found:
        planned = held_bytes(
            sizes,
            parallel_of(settings),
            world_size=world_size,
            stage=rank.pop("stage"),
            dtype_bytes=4 if settings["dtype"] == "float32" else 2,
            dp_rank=rank.pop("dp_rank"),
            expert_dp_rank=rank.pop("expert_dp_rank"),
        )
        assert dataclasses.asdict(planned) == rank


@pytest.mark.parametrize(
    ("model", "world_size", "settings"),
    [
        ("dense", 1, {}),
        ("dense", 1, {"dtype": "float32"}),
        ("dense", 1, {"recompute": "full"}),
        ("dense", 2, {"tensor": 2}),
        ("dense", 2, {"tensor": 2, "sequence": True}),
        ("dense", 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
        ("experts", 1, {}),
        ("experts", 2, {"tensor": 2, "sequence": True}),
        ("experts", 2, {"tensor": 2, "sequence": True, "expert_tensor": 1}),
    ],
)
def test_what_a_forward_saves_is_what_the_planner_counts(
    model: str,
    world_size: int,
    settings: dict[str, Any],
    folders: Mapping[str, Path],
    ranks: Ranks,
) -> None:
    settings = {"dtype": "bfloat16", **settings}
    cuts = [(4, 32), (7, 20), (1, 200)]
    found = ranks.run(cases.saved_by_forward, folders[model], settings, cuts, world_size=world_size)
    sizes, parallel = Model.of(read_hf_config(folders[model])), parallel_of(settings)
    for place, (count, length) in enumerate(cuts):
        cut = Cut(
            model=sizes,
            parallel=parallel,
            tokens=count * length,
            longest=length,
            dtype_bytes=4 if settings["dtype"] == "float32" else 2,
            engine="local",
        )
        is_full = settings.get("recompute") == "full"
        planned = saved_on_stage(cut, stage=0, recompute=is_full, in_flight=1)
        # Experts may be chosen unevenly, whole ones of a rank more often than those of another.
        mean = sum(rank[place] for rank in found) / world_size
        assert planned == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("model", ["dense", "experts"])
@pytest.mark.parametrize(("recompute", "within"), [("none", 0.05), ("full", 0.15)])
def test_the_peak_of_forward_and_backward_is_near_what_the_planner_adds_up(
    model: str, recompute: str, within: float, tmp_path: Path, ranks: Ranks
) -> None:
    """Measured as storages come and go. With few layers the last norm counts, which is freed."""
    sizes: dict[str, Any] = {
        **{"hidden": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "intermediate": 768},
        **{"vocab": 1000, "layers": 4, "max_position_embeddings": 1024, "tie": False},
    }
    if model == "dense":
        folder = tiny_qwen3(tmp_path, **sizes)
    else:
        folder = tiny_qwen3_moe(tmp_path, experts=8, moe_intermediate=256, **sizes)
    settings = {"dtype": "bfloat16", "recompute": recompute}
    (peak,) = ranks.run(cases.peak_of_a_microbatch, folder, settings, 4, 256, world_size=1)
    cut = Cut(
        model=Model.of(read_hf_config(folder)),
        parallel=ParallelConfig(),
        tokens=4 * 256,
        longest=256,
        dtype_bytes=2,
        engine="local",
    )
    planned = layer_working(cut)
    planned += saved_on_stage(cut, stage=0, recompute=recompute == "full", in_flight=1)
    planned += layer_saved(cut) if recompute == "full" else 0
    assert planned == pytest.approx(peak, rel=within)
