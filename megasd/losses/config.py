"""Config section of the train/rollout mismatch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MismatchConfig:
    """Truncated importance sampling between trainer and engine (algorithms.md section 1)."""

    level: Literal["token", "off"] = "token"  # token: loss x min(exp(old - rollout), clip)
    clip: float = 2.0
