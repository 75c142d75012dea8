"""Engines that could not run, or would sample something else, are refused with what to do."""

from typing import Any

import pytest

from megasd.rollout.checks import check_engines
from megasd.rollout.config import RolloutConfig, VLLMConfig

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "moe_intermediate_size": 32,
}


def faults(
    vllm: dict[str, Any] | None = None,
    *,
    is_cuda: bool = True,
    world_size: int = 8,
    dtype: str = "bfloat16",
    **rollout: Any,
) -> list[str]:
    engine = "hf" if vllm is None else "vllm"
    config = RolloutConfig(engine=engine, vllm=VLLMConfig(**vllm or {}), **rollout)  # pyright: ignore
    return check_engines(
        config,
        world_size=world_size,
        ranks_per_stage=4,
        is_cuda=is_cuda,
        dtype=dtype,
        hf_config=MODEL,
    )


@pytest.mark.parametrize(
    "vllm",
    [
        None,
        {},
        {"tensor": 4, "expert_parallel": True, "quantization": "fp8"},
        {"placement": "server", "engines": 8, "tensor": 16},
    ],
)
def test_what_can_run_is_not_complained_about(vllm: dict[str, Any] | None) -> None:
    assert faults(vllm) == []


@pytest.mark.parametrize(
    ("vllm", "options", "sentence"),
    [
        (None, {"min_p": 1.0}, "rollout.min_p: 1.0 is out of range"),
        (None, {"stop": ["a", ""]}, "rollout.stop: an empty string would end every response"),
        ({"tensor": 8}, {}, "rollout.vllm.tensor: 8 does not divide the 4 ranks of a pipeline"),
        ({"engines": 2}, {}, "rollout.vllm.engines: colocated engines fill the trainer's GPUs"),
        ({"placement": "server", "engines": 9}, {}, "rollout.vllm.engines: 9 engines need as many"),
        ({"gpu_memory_utilization": 1.5}, {}, "gpu_memory_utilization: 1.5 is out of range"),
        ({"options": {"seed": 1}}, {}, "rollout.vllm.options: seed is megasd's to set"),
        ({"quantization": "fp8"}, {"dtype": "float32"}, "rollout.vllm.quantization: fp8 engines"),
        ({}, {"is_cuda": False}, "rollout.engine: vLLM on a CPU needs heads (head_dim) of 32"),
        ({"placement": "server", "tensor": 64}, {}, "64 does not divide the 32 attention heads"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(
    vllm: dict[str, Any] | None, options: dict[str, Any], sentence: str
) -> None:
    (fault,) = faults(vllm, **options)
    assert sentence in fault
    assert "; " in fault  # what is wrong; what to do


def test_experts_that_gpus_cannot_share_evenly_are_refused() -> None:
    vllm = {"placement": "server", "tensor": 32, "expert_parallel": True}
    assert faults(vllm) == []
    config = RolloutConfig(engine="vllm", vllm=VLLMConfig(**vllm))  # pyright: ignore
    (fault,) = check_engines(
        config,
        world_size=8,
        ranks_per_stage=4,
        is_cuda=True,
        dtype="bfloat16",
        hf_config=MODEL | {"num_experts": 48},
    )
    assert "32 GPUs (rollout.vllm.tensor) cannot share the 48 experts" in fault
