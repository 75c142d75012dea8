"""The trainer and the engine disagree on log-probs: how much, and the weight that mends it."""

import torch
from torch import Tensor

from megasd.losses.config import MismatchConfig
from megasd.losses.quantile import quantile
from megasd.types import PerToken, TokenIndex, TokenMask

_BLOCK = 2**22  # tokens in float64 at a time


def mismatch_ratio(old_logprobs: PerToken, rollout_logprobs: PerToken) -> PerToken:
    """exp(old - rollout): trainer over engine; the difference is clamped to +-20."""
    return (old_logprobs - rollout_logprobs).clamp(-20.0, 20.0).exp()


def sequence_mismatch_ratio(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    response_mask: TokenMask,
    rollout_ids: TokenIndex,
    *,
    num_rollouts: int,
) -> PerToken:
    """The product of a rollout's ratios over its response tokens, on each of its tokens.

    Summed in float64 as logarithms, whose sum is clamped to +-20.
    """
    difference = torch.where(response_mask, old_logprobs - rollout_logprobs, 0.0).double()
    sums = difference.new_zeros(num_rollouts).index_add(0, rollout_ids, difference)
    return sums.clamp(-20.0, 20.0).exp().float()[rollout_ids]


def mismatch_weights(ratio: PerToken, config: MismatchConfig) -> tuple[PerToken, TokenMask]:
    """Truncated importance sampling: what a token's loss is multiplied by, and which tokens stay.

    The weight is min(ratio, clip); tokens whose ratio is outside `reject` do not stay.
    """
    stays = torch.ones_like(ratio, dtype=torch.bool)
    if config.reject is not None:
        low, high = config.reject
        stays = (ratio >= low) & (ratio <= high)
    return ratio.clamp(max=config.clip), stays


def mismatch_metrics(
    old_logprobs: PerToken, rollout_logprobs: PerToken, mask: TokenMask
) -> dict[str, float]:
    """How far the engine was from the trainer, over the tokens of `mask`; {} when there are none.

    With x = old - rollout and w = mismatch_ratio, not truncated: mean and 99th percentile
    (linear interpolation) of |x|; the share of |x| above 0.1; `kl_rollout_to_old`, the mean of
    the k3 estimate exp(x) - 1 - x of KL(rollout, old), the engine having sampled; and the
    effective sample size (sum w)^2 / (n sum w^2), 1 when all weights are equal.
    """
    old, rollout = old_logprobs[mask], rollout_logprobs[mask]
    if not len(old):
        return {}
    sums = torch.zeros(5, dtype=torch.float64, device=old.device)
    size = (old - rollout).abs_()
    for block in zip(old.split(_BLOCK), rollout.split(_BLOCK), strict=True):
        sums += torch.stack(_sums(*(part.double() for part in block)))
    gap, above, kl, weight, square = sums.tolist()
    return {
        "abs_mean": gap / len(old),
        "abs_p99": quantile(size, 0.99),
        "share_above_0.1": above / len(old),
        "kl_rollout_to_old": kl / len(old),
        "effective_sample_size": weight**2 / square / len(old),
    }


def _sums(old: PerToken, rollout: PerToken) -> list[Tensor]:
    """Of a block, in float64: k3 is a small difference of large numbers."""
    difference, weights = old - rollout, mismatch_ratio(old, rollout)
    size = difference.abs()
    k3 = weights - 1 - torch.log(weights)
    return [
        size.sum(),
        (size > 0.1).double().sum(),
        k3.sum(),
        weights.sum(),
        weights.square().sum(),
    ]


def precision_metrics(float8_logprobs: PerToken, logprobs: PerToken) -> dict[str, float]:
    """How far float8 moves the log-probs of the same tokens under the same weights.

    With x = float8 - bfloat16: mean and 99th percentile (linear interpolation) of |x|, and `k3`,
    the mean of exp(x) - 1 - x: an estimate of KL(bfloat16, float8) on tokens that the bfloat16
    policy samples. A difference that is not finite is one in each of the three.
    """
    difference = float8_logprobs.double() - logprobs.double()
    return {
        "abs_mean": difference.abs().mean().item(),
        "abs_p99": quantile(difference.abs().float(), 0.99),
        "k3": (difference.exp() - 1 - difference).mean().item(),
    }
