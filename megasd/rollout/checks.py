"""Whether the engines that `rollout` asks for can run beside the trainer: arithmetic only.

Sentences as in megasd/configuration/validate.py.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from megasd.rollout.config import RolloutConfig, VLLMConfig
from megasd.weights.fp8 import BLOCK
from megasd.weights.tables import table_for

# What the engine sets itself; `rollout.vllm.options` may not.
OWN_OPTIONS = (
    *("model", "dtype", "load_format", "seed", "generation_config", "logprobs_mode"),
    *("tensor_parallel_size", "enable_expert_parallel", "max_num_seqs", "enable_sleep_mode"),
    *("pipeline_parallel_size", "data_parallel_size"),  # an engine's workers are its `tensor` GPUs
    *("hf_overrides", "quantization"),  # the trainer would train another model, or other weights
    *("worker_extension_cls", "weight_transfer_config"),
)


def check_engines(
    rollout: RolloutConfig,
    *,
    world_size: int,
    ranks_per_stage: int,
    is_cuda: bool,
    dtype: str,
    hf_config: Mapping[str, Any] | None,
    max_tokens: int,
    needs_vllm: bool = True,
) -> list[str]:
    """Every reason why the engines cannot be started, or would sample something else.

    `max_tokens`: of a prompt and its response. `needs_vllm`: this machine's packages are those of
    the run.
    """
    faults = []
    if not 0 <= rollout.min_p < 1:
        faults.append(
            f"rollout.min_p: {rollout.min_p} is out of range; set it to 0 or more, below 1"
        )
    if "" in rollout.stop:
        faults.append("rollout.stop: an empty string would end every response; leave it out")
    if rollout.engine != "vllm":
        return faults
    vllm = rollout.vllm
    if needs_vllm and importlib.util.find_spec("vllm") is None:
        faults.append("rollout.engine: vllm is not installed; install it, or set the engine to hf")
    faults += _options(vllm, max_tokens)
    if not 0 < vllm.gpu_memory_utilization <= 1:
        faults.append(
            f"rollout.vllm.gpu_memory_utilization: {vllm.gpu_memory_utilization} is out of range; "
            "set it above 0 and to 1 or less"
        )
    if vllm.expert_parallel and not is_cuda:
        faults.append("rollout.vllm.expert_parallel: vLLM cannot on a CPU; set it to false")
    head_dim = 0 if hf_config is None else hf_config.get("head_dim") or 0
    if 0 < head_dim < 32 and not is_cuda:
        faults.append(
            f"rollout.engine: vLLM on a CPU needs heads (head_dim) of 32 or more, and model.path "
            f"has {head_dim}; set the engine to hf"
        )
    if vllm.quantization == "fp8" and not (is_cuda and dtype == "bfloat16"):
        faults.append(
            "rollout.vllm.quantization: fp8 engines need a GPU and model.dtype: bfloat16; "
            "set it to none"
        )
    return (
        faults
        + _placement(rollout, world_size, ranks_per_stage, is_cuda)
        + _cut(vllm.tensor, vllm.expert_parallel, hf_config)
        + (_fp8_cut(vllm, hf_config) if vllm.quantization == "fp8" and hf_config else [])
    )


def _options(vllm: VLLMConfig, max_tokens: int) -> list[str]:
    faults = []
    if own := sorted(set(vllm.options) & set(OWN_OPTIONS)):
        faults.append(f"rollout.vllm.options: {', '.join(own)} is megasd's to set; leave it out")
    length = vllm.options.get("max_model_len", max_tokens)
    if not isinstance(length, int) or length < max_tokens:
        faults.append(
            f"rollout.vllm.options: max_model_len {length} is less than the {max_tokens} tokens of "
            "a prompt and its response (data.max_prompt_tokens, rollout.max_response_tokens); "
            "leave it out"
        )
    return faults


def _placement(
    rollout: RolloutConfig, world_size: int, ranks_per_stage: int, is_cuda: bool
) -> list[str]:
    vllm = rollout.vllm
    if vllm.placement == "server":
        if vllm.park_trainer:
            return [
                "rollout.vllm.park_trainer: engines on servers have GPUs of their own, and use "
                "nothing of the trainer's; leave it out"
            ]
        if vllm.engines <= world_size:
            return []
        return [
            f"rollout.vllm.engines: {vllm.engines} engines need as many ranks that feed them, and "
            f"there are {world_size}; lower it, or raise rollout.vllm.tensor"
        ]
    if vllm.engines != 1:
        return [
            "rollout.vllm.engines: colocated engines fill the trainer's GPUs, so their number is "
            "not a choice; leave it out, or set rollout.vllm.placement to server"
        ]
    if is_cuda and ranks_per_stage % vllm.tensor:
        return [
            f"rollout.vllm.tensor: {vllm.tensor} does not divide the {ranks_per_stage} ranks of a "
            "pipeline stage, whose GPUs the engines share; choose a divisor"
        ]
    return []


def _cut(tensor: int, expert_parallel: bool, hf_config: Mapping[str, Any] | None) -> list[str]:
    if hf_config is None:
        return []
    heads, faults = hf_config["num_attention_heads"], []
    if heads % tensor:
        faults.append(
            f"rollout.vllm.tensor: {tensor} does not divide the {heads} attention heads of "
            f"model.path; choose a divisor of {heads}"
        )
    experts = table_for(hf_config).num_experts
    if expert_parallel and (not experts or experts % tensor):
        faults.append(
            f"rollout.vllm.expert_parallel: {tensor} GPUs (rollout.vllm.tensor) cannot share the "
            f"{experts} experts of model.path evenly; set it to false"
        )
    return faults


def _fp8_cut(vllm: VLLMConfig, hf_config: Mapping[str, Any]) -> list[str]:
    """vLLM wants whole blocks of scales on every GPU, as its 0.26 does in all layers.

    Later releases can divide the blocks of experts; the range is driven as one.
    """
    heads, tensor = hf_config["num_attention_heads"], vllm.tensor
    if heads % tensor:
        return []  # has its own sentence
    head_dim = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    experts = table_for(hf_config).num_experts
    name = "moe_intermediate_size" if experts else "intermediate_size"
    whole = experts and vllm.expert_parallel
    parts = {
        "queries": heads // tensor * head_dim,
        "keys": max(1, hf_config["num_key_value_heads"] // tensor) * head_dim,
        name: hf_config[name] / (1 if whole else tensor),
    }
    remedy = "share whole experts (rollout.vllm.expert_parallel), " if experts and not whole else ""
    return [
        f"rollout.vllm.quantization: fp8 has scales for blocks of {BLOCK}, and of model.path's "
        f"{what} each of {tensor} GPUs (rollout.vllm.tensor) would have {part:g}; {remedy}"
        "choose another rollout.vllm.tensor, or set the quantization to none"
        for what, part in parts.items()
        if part % BLOCK
    ]
