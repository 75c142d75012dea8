"""Config sections of the losses: train/rollout mismatch, divergence of two distributions."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MismatchConfig:
    """Truncated importance sampling between the trainer and the engine that sampled.

    With mismatch_ratio = exp(old - rollout): a token's loss is multiplied by min(ratio, clip);
    `sequence` takes the product of the ratios over the rollout. What lies outside `reject` leaves
    the update and its denominators: tokens, or under `sequence` whole rollouts.
    """

    level: Literal["token", "sequence", "off"] = "token"
    clip: float = 2.0
    reject: tuple[float, float] | None = None  # [low, high] of the ratio before it is truncated

    @property
    def needs_old_logprobs(self) -> bool:
        """True where weights must be known before the update's own forward pass."""
        return self.level == "sequence" or self.reject is not None


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Which divergence between teacher T and student S, and on which ids of the vocabulary."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"  # forward: KL(T, S)
    alpha: float = 0.5  # jsd: alpha KL(T, M) + (1 - alpha) KL(S, M), M = alpha T + (1 - alpha) S
    support: Literal["student", "teacher", "full"] = "student"  # whose K most likely ids
    top_k: int = 100  # K; support full takes the whole vocabulary
    rest: Literal["tail", "renormalise"] = "tail"  # what the K ids leave out: one more bucket
    entry_clip: float | None = None  # upper bound on each id's term

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(
                "algorithm.divergence.alpha must be between 0 and 1, not "
                f"{self.alpha}; for its ends take kind forward_kl (0) or reverse_kl (1)"
            )
        if self.top_k < 1:
            raise ValueError(f"algorithm.divergence.top_k must be 1 or more, not {self.top_k}")
        if self.entry_clip is not None and not self.entry_clip > 0:
            raise ValueError(
                f"algorithm.divergence.entry_clip must be above 0, or null, not {self.entry_clip}"
            )
