"""The options of an engine, as vLLM's configuration takes them on GPUs: a card is pretended."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.weights.fp8 import unquantized_modules
from megasd.weights.hf_folder import read_hf_config
from megasd.weights.tables import table_for
from tests.rollout import vllm_card

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")

FP8: Any = {"quantization": "fp8"}
ENGINES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dense": ("dense", {}),
    "dense fp8": ("dense", {**FP8, "placement": "server", "kv_cache_gib": 2.0}),
    "experts": ("experts", {"tensor": 2, "expert_parallel": True, "max_sequences": 17}),
    "experts fp8": ("experts", FP8),
    "last word": ("dense", {"options": {"enforce_eager": True, "max_model_len": 90}}),
}
ALL = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Sizes that scales of 128 x 128 fit."""
    root = tmp_path_factory.mktemp("models")
    same: Any = {"vocab": 128, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}
    return {
        "dense": tiny_qwen3(root / "dense", intermediate=512, tie=False, **same),
        "experts": tiny_qwen3_moe(root / "experts", moe_intermediate=128, **same),
    }


@pytest.fixture(scope="module")
def found(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    process = Ranks(size=1)
    try:
        return process.run(vllm_card.configured, folders, ENGINES, world_size=1)[0]
    finally:
        process.close()


@ALL
def test_it_runs_on_the_gpu_and_waits_for_our_weights(
    engine: str, found: dict[str, dict[str, Any]]
) -> None:
    facts = found[engine]
    assert facts["device"] == "cuda"
    assert facts["worker"] == "vllm.v1.worker.gpu_worker.Worker"
    assert facts["extension"] == "megasd.rollout.vllm.receive.WorkerExtension"
    assert (facts["transfer"], facts["load"]) == ("megasd", "dummy")
    assert facts["dtype"] == torch.bfloat16
    assert facts["logprobs"] == "processed_logprobs"
    assert facts["length"] == (90 if engine == "last word" else 200)


@ALL
def test_it_decodes_by_cuda_graphs_and_sleeps_where_the_trainer_shares_its_gpu(
    engine: str, found: dict[str, dict[str, Any]]
) -> None:
    facts = found[engine]
    assert facts["sleeps"] == (engine != "dense fp8")
    assert facts["eager"] == (engine == "last word")
    assert (facts["graphs"] == "NONE") == (engine == "last word")


def test_memory_and_the_cut_are_those_of_the_configuration(
    found: dict[str, dict[str, Any]],
) -> None:
    assert found["dense"]["cache"] is None
    assert found["dense"]["share"] == 0.6
    assert found["dense fp8"]["cache"] == 2 << 30
    assert found["dense"]["tensor"][0] == 1
    assert found["experts"]["tensor"] == (2, "mp")
    assert found["experts"]["expert_parallel"]
    assert found["experts"]["sequences"] == 17


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_float8_is_of_blocks_and_leaves_alone_what_the_trainer_sends_in_bfloat16(
    model: str, folders: Mapping[str, Path], found: dict[str, dict[str, Any]]
) -> None:
    plain, facts = found[model], found[f"{model} fp8"]
    assert plain["quantization"] is None
    assert (facts["quantization"], facts["blocks"]) == ("fp8", [128, 128])
    assert facts["activations"] == "dynamic"
    shapes = table_for(read_hf_config(folders[model])).hf_shapes()
    assert facts["not_quantized"] == sorted(unquantized_modules(shapes))
    # Other kernels of experts keep what they made of the first weights.
    assert facts["experts"] == ("triton" if model == "experts" else "auto")
