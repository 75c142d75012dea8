"""From config to what vLLM is started with: plain values, no vllm, nothing that needs a GPU."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megasd.rollout.config import VLLMConfig
from megasd.weights.fp8 import BLOCK, unquantized_modules

GIB = 2**30
CPU_STEP = 4096  # tokens, vLLM's own choice for a CPU


def engine_options(
    config: VLLMConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,  # of a prompt and its response
    hf_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; `config.options` has the last word."""
    on_cpu = device.type == "cpu"
    if on_cpu and config.expert_parallel:
        raise ValueError(
            "rollout.vllm.expert_parallel: vLLM's CPU kernel needs all experts; set it to false"
        )
    if on_cpu and config.quantization == "fp8":
        raise ValueError("rollout.vllm.quantization: fp8 needs a GPU; set it to none")
    options: dict[str, Any] = {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": "dummy",  # weights arrive by an update, never from the folder
        "tensor_parallel_size": config.tensor,
        "enable_expert_parallel": config.expert_parallel,
        "max_num_seqs": config.max_sequences,
        # Else the cache must hold one sequence of all positions that the model has.
        "max_model_len": max_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        # Of the distribution that was sampled from, as `Rollout.logprobs` promises.
        "logprobs_mode": "processed_logprobs",
        # The folder's defaults (a repetition penalty, say) must not change what is sampled.
        "generation_config": "vllm",
        "seed": 0,  # requests have their own
    }
    if config.tensor > 1:
        options["distributed_executor_backend"] = "mp"
    cache_gib = config.kv_cache_gib
    if on_cpu:
        options["enforce_eager"] = True
        # Whole prompts in a step, never parts: vLLM winds a request's random numbers back after a
        # part, which a CPU's generator cannot.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(CPU_STEP, max_tokens + config.max_sequences)
        cache_gib = 1.0 if cache_gib is None else cache_gib
    elif config.placement == "colocated":
        options["enable_sleep_mode"] = True
    if cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(cache_gib * GIB)
    if config.quantization == "fp8":
        options |= _fp8(hf_shapes)
    return options | config.options


def _fp8(hf_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": unquantized_modules(hf_shapes),
    }
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": config}}
    if any(".experts." in name for name in hf_shapes):
        # Others of vLLM's kernels keep what they made of the first weights (vllm#41670).
        options["moe_backend"] = "triton"
    return options


def visible_device(device: torch.device) -> str:
    """The GPU's number on this machine, whatever this process sees of it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(index) if not visible else visible.split(",")[index]
