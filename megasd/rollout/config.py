"""Config section of the rollout engines."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megasd.losses.config import MismatchConfig


@dataclass(frozen=True)
class VLLMConfig:
    """`rollout.vllm:` engines of vLLM; each is a process of its own."""

    placement: Literal["colocated", "server"] = "colocated"
    # colocated: on the trainer's GPUs, asleep while it trains; server: on nodes of their own
    tensor: int = 1  # GPUs of one engine
    expert_parallel: bool = False  # the GPUs of an engine share out whole experts
    engines: int = 1  # server: how many
    quantization: Literal["none", "fp8"] = "none"  # fp8: blocks of 128 x 128, scales travel along
    gpu_memory_utilization: float = 0.6  # share of a GPU's memory for weights and cache
    kv_cache_gib: float | None = None  # of one GPU, or of the CPU (null there: 1)
    park_trainer: bool = False
    # colocated: while engines sample, gradients are freed and optimizer and teacher in host memory
    max_sequences: int = 256  # decoded at the same time by one engine
    start_timeout_seconds: int = 1800  # large models with cold caches compile for long
    timeout_seconds: int = 600  # in which an engine gets nothing done, before it is replaced
    options: dict[str, Any] = field(default_factory=dict)  # passed to vLLM's LLM as they are


@dataclass(frozen=True)
class SyncConfig:
    """`rollout.sync:` how weights reach the engines, and how that is checked."""

    bucket_mib: int = 512  # travels at once; a rank holds two of them
    checksum_every: int = 50  # syncs; always at the first; 0: only then
    probe_gap: float | None = None
    # mean |log-prob of engine - trainer| after the first sync; null: by dtype


@dataclass(frozen=True)
class RolloutConfig:
    """`rollout:` how responses are sampled."""

    engine: Literal["hf", "vllm"] = "hf"  # hf: transformers' generate, for tests and tiny models
    prompts_per_step: int = 256
    group_size: int = 8
    max_response_tokens: int = 4096
    temperature: float = 1.0  # the trainer scores at the same temperature
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    stop: list[str] = field(default_factory=list)  # strings that end a response
    batch_size: int = 256  # hf: sequences generated at the same time
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
