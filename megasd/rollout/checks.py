"""Whether the engines that `rollout` asks for can run beside the trainer: arithmetic only.

Sentences as in megasd/configuration/validate.py.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from megasd.rollout.config import RolloutConfig
from megasd.weights.tables import table_for

# What the engine sets itself; `rollout.vllm.options` may not.
OWN_OPTIONS = (
    *("model", "dtype", "load_format", "seed", "generation_config", "logprobs_mode"),
    *("tensor_parallel_size", "enable_expert_parallel", "max_num_seqs", "enable_sleep_mode"),
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
    needs_vllm: bool = True,
) -> list[str]:
    """Every reason why the engines cannot be started, or would sample something else.

    `needs_vllm`: this machine's packages are those of the run.
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
    if own := sorted(set(vllm.options) & set(OWN_OPTIONS)):
        faults.append(f"rollout.vllm.options: {', '.join(own)} is megasd's to set; leave it out")
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
    )


def _placement(
    rollout: RolloutConfig, world_size: int, ranks_per_stage: int, is_cuda: bool
) -> list[str]:
    vllm = rollout.vllm
    if vllm.placement == "server":
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
