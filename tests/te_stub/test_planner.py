"""What the planner counts of Transformer Engine's layers is what its Python holds and saves."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megasd.planner.activations import Cut, kept_on_stage, last_norm_saved
from megasd.planner.buffers import held_bytes
from megasd.planner.model import Model
from megasd.policy.config import ParallelConfig
from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.weights.hf_folder import read_hf_config
from tests.distributed import planner_cases
from tests.te_stub import cases
from tests.te_stub.cases import with_transformer_engine


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    sizes: Any = {"hidden": 72, "heads": 6, "kv_heads": 2, "head_dim": 24, "layers": 3}
    if request.param == "dense":
        return tiny_qwen3(path, intermediate=112, **sizes)
    return tiny_qwen3_moe(path, experts=8, moe_intermediate=56, **sizes)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_a_forward_saves(recompute: str, folder: Path, te: Ranks) -> None:
    cuts, settings = [(4, 32), (7, 20), (1, 1500)], {"dtype": "bfloat16", "recompute": recompute}
    (found,) = te.run(cases.saved_by_forward, folder, settings, cuts, world_size=1)
    for (count, length), saved in zip(cuts, found, strict=True):
        cut = Cut(
            model=Model.of(read_hf_config(folder)),
            parallel=ParallelConfig(),
            tokens=count * length,
            longest=length,
            dtype_bytes=2,
            engine="transformer_engine",
        )
        kept = kept_on_stage(cut, stage=0, recompute=recompute == "full", in_flight=1)
        # Beside it the places of the sequences, for each layer.
        assert kept + last_norm_saved(cut) == pytest.approx(saved, rel=1e-3)


def test_weights_gradients_and_optimizer_to_the_byte(folder: Path, te: Ranks) -> None:
    given = (planner_cases.held_by_megatron, folder, {"dtype": "bfloat16"})
    (found,) = te.run(with_transformer_engine, *given, world_size=1)
    places = {"dp_rank": found.pop("dp_rank"), "expert_dp_rank": found.pop("expert_dp_rank")}
    model, stage = Model.of(read_hf_config(folder)), found.pop("stage")
    layout = {"world_size": 1, "stage": stage, "dtype_bytes": 2}
    held = held_bytes(model, ParallelConfig(), **layout, **places)
    assert dataclasses.asdict(held) == found
