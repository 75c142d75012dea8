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
    model: dict[str, Any] | None = None,
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
        hf_config=MODEL | (model or {}),
        max_tokens=100,
    )


@pytest.mark.parametrize(
    "vllm",
    [
        None,
        {},
        {"tensor": 4, "expert_parallel": True},
        {"options": {"max_model_len": 100}},
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
        (
            {"placement": "server", "park_trainer": True},
            {},
            "park_trainer: engines on servers have",
        ),
        ({"gpu_memory_utilization": 1.5}, {}, "gpu_memory_utilization: 1.5 is out of range"),
        ({"options": {"seed": 1}}, {}, "rollout.vllm.options: seed is megasd's to set"),
        ({"options": {"hf_overrides": {}}}, {}, "hf_overrides is megasd's to set"),
        ({"options": {"pipeline_parallel_size": 2}}, {}, "pipeline_parallel_size is megasd's"),
        ({"options": {"max_model_len": 99}}, {}, "max_model_len 99 is less than the 100 tokens"),
        ({"options": {"max_model_len": "8k"}}, {}, "max_model_len 8k is less than the 100 tokens"),
        (
            {"quantization": "fp8"},
            {"dtype": "float32", "model": {"moe_intermediate_size": 128}},
            "rollout.vllm.quantization: fp8 engines",
        ),
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
    (fault,) = faults(vllm, model={"num_experts": 48})
    assert "32 GPUs (rollout.vllm.tensor) cannot share the 48 experts" in fault


@pytest.mark.parametrize(
    ("tensor", "expert_parallel", "model", "wrong"),
    [
        (2, False, {}, []),  # 384 = 3 x 128
        (
            4,
            False,
            {},
            ["moe_intermediate_size each of 4 GPUs (rollout.vllm.tensor) would have 192"],
        ),
        (4, True, {}, []),
        (1, False, {"moe_intermediate_size": 704}, ["moe_intermediate_size each of 1 GPUs"]),
        (4, True, {"moe_intermediate_size": 704}, ["moe_intermediate_size each of 4 GPUs"]),
        (4, True, {"head_dim": 64}, []),
        (8, True, {"head_dim": 64}, ["keys each of 8 GPUs (rollout.vllm.tensor) would have 64"]),
        (16, True, {"head_dim": 64}, ["keys each of 16 GPUs"]),
        (4, False, {"model_type": "qwen3", "intermediate_size": 9728}, []),
        (8, False, {"model_type": "qwen3", "intermediate_size": 9728}, ["intermediate_size each"]),
        (3, False, {}, ["3 does not divide the 32 attention heads"]),
    ],
)
def test_float8_needs_whole_blocks_on_every_gpu(
    tensor: int, expert_parallel: bool, model: dict[str, Any], wrong: list[str]
) -> None:
    """30B-A3B's experts among four GPUs, for example: 768 / 4 is one block and a half."""
    vllm = {"tensor": tensor, "expert_parallel": expert_parallel, "quantization": "fp8"}
    sizes = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128}
    found = faults(vllm | {"placement": "server"}, model=sizes | model)
    assert len(found) == len(wrong)
    for fault, sentence in zip(found, wrong, strict=True):
        assert sentence in fault
        assert "choose " in fault
    assert faults(vllm | {"placement": "server", "quantization": "none"}, model=sizes | model) == (
        found if tensor == 3 else []
    )
