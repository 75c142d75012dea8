"""What an engine is started with: the length that a run needs, and one list of what is float8."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megasd.rollout.config import VLLMConfig
from megasd.rollout.vllm.options import engine_options
from megasd.weights.fp8 import is_quantized, unquantized_modules
from megasd.weights.tables import table_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MODEL = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "intermediate_size": 128,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}


def shapes_of(model_type: str) -> dict[str, tuple[int, ...]]:
    return table_for(MODEL | {"model_type": model_type}).hf_shapes()


def options_of(
    device: torch.device, model_type: str = "qwen3", *, max_tokens: int = 72, **config: Any
) -> dict[str, Any]:
    return engine_options(
        VLLMConfig(**config),
        Path("model"),
        dtype=torch.bfloat16,
        device=device,
        max_tokens=max_tokens,
        hf_shapes=shapes_of(model_type),
    )


def test_options_say_what_the_config_says_and_the_last_word_is_the_users() -> None:
    options = options_of(CUDA, tensor=4, quantization="fp8", options={"max_num_seqs": 7})
    assert options["dtype"] == "bfloat16"
    assert options["tensor_parallel_size"] == 4
    assert options["enable_sleep_mode"]
    assert options["max_num_seqs"] == 7
    assert options["load_format"] == "dummy"
    assert options["logprobs_mode"] == "processed_logprobs"
    assert "kv_cache_memory_bytes" not in options
    quantization = options["hf_overrides"]["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128]
    options = options_of(CUDA, placement="server", kv_cache_gib=2)
    assert "enable_sleep_mode" not in options
    assert options["kv_cache_memory_bytes"] == 2 * 2**30


@pytest.mark.parametrize("wrong", [{"quantization": "fp8"}, {"expert_parallel": True}])
def test_what_a_cpu_cannot_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rollout\.vllm\."):
        options_of(CPU, **wrong)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_cache_is_asked_to_hold_a_sequence_of_the_run_not_of_the_model(
    device: torch.device,
) -> None:
    assert options_of(device)["max_model_len"] == 72
    assert options_of(device, options={"max_model_len": 90})["max_model_len"] == 90


@pytest.mark.parametrize(("max_tokens", "sequences"), [(72, 32), (72, 8192), (40_000, 256)])
def test_a_cpu_reads_prompts_whole(max_tokens: int, sequences: int) -> None:
    """In parts vLLM would rewind the random numbers of a seeded request, which a CPU cannot."""
    options = options_of(CPU, max_tokens=max_tokens, max_sequences=sequences)
    assert options["enable_chunked_prefill"] is False
    assert options["max_num_batched_tokens"] >= max_tokens + sequences, "beside all that decode"
    assert "max_num_batched_tokens" not in options_of(CUDA)


def test_float8_is_every_projection_and_no_router_embedding_or_head() -> None:
    shapes = shapes_of("qwen3_moe")
    kept = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert sorted(unquantized_modules(shapes)) == ["lm_head", "model.embed_tokens", *kept]
    travel = {name for name, shape in shapes.items() if is_quantized(name, shape)}
    assert {name.rsplit(".", 2)[1] for name in travel} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    options = options_of(CUDA, "qwen3_moe", quantization="fp8")
    listed = options["hf_overrides"]["quantization_config"]["modules_to_not_convert"]
    assert listed == unquantized_modules(shapes)


def test_float8_experts_run_in_the_kernel_that_reads_new_weights() -> None:
    assert options_of(CUDA, "qwen3_moe", quantization="fp8")["moe_backend"] == "triton"
    assert "moe_backend" not in options_of(CUDA, "qwen3", quantization="fp8")
    assert "moe_backend" not in options_of(CUDA, "qwen3_moe")
