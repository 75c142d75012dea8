"""Config section of the rollout engines."""

from dataclasses import dataclass, field
from typing import Literal

from megasd.losses.config import MismatchConfig


@dataclass(frozen=True)
class RolloutConfig:
    """`rollout:` how responses are sampled."""

    engine: Literal["hf"] = "hf"  # transformers' generate, one engine per data-parallel rank
    prompts_per_step: int = 256
    group_size: int = 8
    max_response_tokens: int = 4096
    temperature: float = 1.0  # the trainer scores at the same temperature
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    batch_size: int = 256  # sequences generated at the same time by one engine
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
