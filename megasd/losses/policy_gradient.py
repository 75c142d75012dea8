"""Policy-gradient surrogates: per token, no reduction, no communication."""

from dataclasses import dataclass
from typing import Literal

import torch

from megasd.types import PerToken, TokenLoss


@dataclass(frozen=True, kw_only=True)
class ClipRange:
    """Importance ratios beyond [1 - low, 1 + high] earn nothing more."""

    low: float = 0.2
    high: float = 0.28  # above `low`: DAPO's clip-higher, arXiv:2503.14476
    dual: float | None = None  # c > 1: the loss of a negative advantage stops at ratio c

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1:
            raise ValueError(f"algorithm.clip.low must be between 0 and 1, not {self.low}")
        if not self.high >= 0:
            raise ValueError(f"algorithm.clip.high must be 0 or more, not {self.high}")
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"algorithm.clip.dual must be above 1, or null, not {self.dual}")


def clipped_surrogate(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, *, clip: ClipRange
) -> TokenLoss:
    """PPO's clipped surrogate, eq. 7 of arXiv:1707.06347, as a loss: -pg(a).

    pg(a) = min(rho a, clip(rho, 1 - low, 1 + high) a), rho = exp(logprobs - old_logprobs), the
    difference clamped to +-20. With `clip.dual` c, where a < 0: pg = max(pg, c a)
    (arXiv:1912.09729). Metrics: rho; 1 where a clip is active; kl_old_to_current, the k3 estimate
    rho - 1 - log rho of KL(old, current) on tokens that the old weights sampled.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    surrogate = torch.minimum(unclipped, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages)
    if clip.dual is not None:
        bounded = torch.maximum(surrogate, clip.dual * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    return TokenLoss(
        -surrogate,
        {
            "importance_ratio": ratio.detach(),
            "clip_fraction": (surrogate != unclipped).float(),
            "kl_old_to_current": (ratio - 1 - log_ratio).detach(),
        },
    )


def reference_kl(
    logprobs: PerToken, ref_logprobs: PerToken, *, estimator: Literal["k1", "k2", "k3"]
) -> PerToken:
    """An estimate of KL(student, reference) per token that the student sampled, with gradient.

    With x = ref - logprob, clamped to +-20: k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x
    (Schulman, "Approximating KL divergence").
    """
    x = (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case "k3":
            return x.exp() - 1 - x
