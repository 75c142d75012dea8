"""The planner's bytes are those of the real model: held exactly, saved within a few per cent."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

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
        kept = kept_on_stage(cut, stage=0, recompute=is_full, in_flight=1)
        # Experts may be chosen unevenly, whole ones of a rank more often than those of another.
        saved = mean(rank[place] for rank in found)
        assert kept + last_norm_saved(cut) == pytest.approx(saved, rel=0.01)


SEQUENCE: dict[str, Any] = {"tensor": 2, "sequence": True}
PEAKS: list[tuple[str, str, dict[str, Any]]] = [
    ("dense", "wide", {}),
    ("dense", "wide", {"dtype": "float32"}),
    ("dense", "wide", SEQUENCE),
    ("dense", "deep", {}),
    ("dense", "deep", SEQUENCE),
    ("experts", "wide", {}),
    ("experts", "wide", SEQUENCE),
    ("experts", "wide", {**SEQUENCE, "expert_tensor": 1}),
    ("experts", "wide", {"expert": 2}),
    ("experts", "deep", {}),
    ("experts", "deep", SEQUENCE),
    ("experts", "deep", {**SEQUENCE, "expert": 2}),
]
SIZES: dict[str, dict[str, Any]] = {
    "wide": {
        **{"hidden": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "intermediate": 768},
        **{"layers": 4, "experts": 8, "moe_intermediate": 256},
    },
    "deep": {  # attention takes most, experts are wider than what goes through them, and few
        **{"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 192},
        **{"layers": 6, "experts": 4, "moe_intermediate": 192},
    },
}


def tiny_model(folder: Path, model: str, size: str, **changes: Any) -> Path:
    sizes = {**SIZES[size], "vocab": 1000, "max_position_embeddings": 1024, "tie": False}
    of_experts = {name: sizes.pop(name) for name in ("experts", "moe_intermediate")}
    if model == "dense":
        return tiny_qwen3(folder, **{**sizes, **changes})
    return tiny_qwen3_moe(folder, **sizes, **of_experts)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("model", "size", "settings"), PEAKS)
def test_the_peak_of_forward_and_backward_is_what_the_planner_adds_up(
    model: str, size: str, settings: dict[str, Any], recompute: str, tmp_path: Path, ranks: Ranks
) -> None:
    """On every rank, measured as storages come and go; experts with as many tokens as they got.

    They are those of all layers where all are kept, of the fullest where one is recomputed.
    """
    folder = tiny_model(tmp_path, model, size)
    parallel = parallel_of(settings)
    settings = {"dtype": "bfloat16", **settings, "recompute": recompute}
    found = ranks.run(
        cases.peak_of_a_microbatch,
        *(folder, settings, 4, 256),
        world_size=max(parallel.tensor, parallel.expert),
    )
    cut = Cut(
        model=Model.of(read_hf_config(folder)),
        parallel=parallel,
        tokens=4 * 256,
        longest=256,
        dtype_bytes=4 if settings["dtype"] == "float32" else 2,
        engine="local",
    )
    is_full = recompute == "full"
    for peak, computed in found:
        if computed:
            tokens = max(computed) if is_full else mean(computed)
            cut = dataclasses.replace(cut, imbalance=1.0)
            cut = dataclasses.replace(cut, imbalance=tokens / cut.slots)
        planned = gather_buffer(cut)
        planned += kept_on_stage(cut, stage=0, recompute=is_full, in_flight=1)
        planned += max(last_norm_going_backward(cut), layers_going_backward(cut, recompute=is_full))
        assert planned == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_the_head_saved_is_freed_when_the_layers_go_backward(
    recompute: str, tmp_path: Path, ranks: Ranks
) -> None:
    """A whole update of a model whose layers take more than its head holds no more than they do."""
    folder = tiny_model(tmp_path, "dense", "wide", intermediate=1536)
    settings = {"dtype": "bfloat16", "recompute": recompute, "chunk": 64}
    ((peak, _),) = ranks.run(cases.peak_of_an_update, folder, settings, 4, 256, world_size=1)
    cut = Cut(
        model=Model.of(read_hf_config(folder)),
        parallel=ParallelConfig(),
        tokens=4 * 256,
        longest=256,
        dtype_bytes=2,
        engine="local",
    )
    is_full = recompute == "full"
    planned = kept_on_stage(cut, stage=0, recompute=is_full, in_flight=1)
    planned += layers_going_backward(cut, recompute=is_full)
    assert planned == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("settings", [{}, {**SEQUENCE, "expert": 2}], ids=["1 rank", "TP2 SP EP2"])
def test_an_update_of_experts_leaves_only_what_every_update_uses(
    settings: dict[str, Any], recompute: str, tmp_path: Path, ranks: Ranks
) -> None:
    """The positions' rotations, the buffer to gather into, and some counts; no layer's input."""
    folder = tiny_model(tmp_path, "experts", "wide")
    parallel = parallel_of(settings)
    settings = {"dtype": "bfloat16", **settings, "recompute": recompute}
    found = ranks.run(cases.peak_of_an_update, folder, settings, 4, 256, world_size=parallel.tensor)
    cut = Cut(
        model=Model.of(read_hf_config(folder)),
        parallel=parallel,
        tokens=4 * 256,
        longest=256,
        dtype_bytes=2,
        engine="local",
    )
    rotations = 256 * cut.model.head_dim * 4
    for _, left in found:
        assert left == pytest.approx(rotations + gather_buffer(cut), abs=2**10)
