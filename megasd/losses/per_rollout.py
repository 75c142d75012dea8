"""Statistics of each rollout over its own response tokens, all rollouts in one pass.

Computed and returned in float64; 0 for a rollout without response tokens.
"""

from typing import Literal

import torch

from megasd.types import PerRollout, PerToken, ResponseBatch


def quantile(values: PerToken, share: float, batch: ResponseBatch) -> PerRollout:
    """The `share`-quantile of each rollout, linear between the two nearest values.

    Share 0.5 is the median: of an even count, the mean of the middle two.
    """
    rollout_ids = batch.rollout_ids[batch.response_mask]
    ascending, order = values[batch.response_mask].double().sort()
    # Two sorts, the second stable: rollout by rollout, ascending within each. The last zero is
    # what a rollout without tokens at the end of the batch finds.
    rollout_ids, order = rollout_ids[order].sort(stable=True)
    ranked = torch.cat([ascending[order], ascending.new_zeros(1)])
    lengths = torch.bincount(rollout_ids, minlength=batch.num_rollouts)
    starts = lengths.cumsum(0) - lengths
    place = share * (lengths - 1).clamp(min=0).double()
    below, above = (ranked[starts + bound.long()] for bound in (place.floor(), place.ceil()))
    return torch.where(lengths > 0, torch.lerp(below, above, place.frac()), 0.0)


def mean(values: PerToken, batch: ResponseBatch) -> PerRollout:
    """The mean of each rollout."""
    rollout_ids = batch.rollout_ids[batch.response_mask]
    sums = torch.zeros(batch.num_rollouts, dtype=torch.float64, device=values.device)
    sums = sums.index_add(0, rollout_ids, values[batch.response_mask].double())
    return sums / torch.bincount(rollout_ids, minlength=batch.num_rollouts).clamp(min=1)


def mean_absolute_deviation(values: PerToken, batch: ResponseBatch) -> PerRollout:
    """mean |v - mean v| of each rollout."""
    return mean((values.double() - mean(values, batch)[batch.rollout_ids]).abs(), batch)


def sinusoidal_position(batch: ResponseBatch) -> PerToken:
    """sin(2 pi t / T) of the t-th, from 0, of a rollout's T response tokens; elsewhere without
    meaning. Rounded, so that equal heights of the curve are ties."""
    lengths = torch.bincount(batch.rollout_ids[batch.response_mask], minlength=batch.num_rollouts)
    before = lengths.cumsum(0) - lengths
    place = batch.response_mask.cumsum(0) - 1 - before[batch.rollout_ids]
    turns = place.double() / lengths.clamp(min=1)[batch.rollout_ids]
    return torch.sin(2 * torch.pi * turns).round(decimals=9)


def router(
    values: PerToken,
    share: float,
    batch: ResponseBatch,
    *,
    shape: Literal["tanh", "hard", "linear"],
) -> PerToken:
    """From 1, far below the `share`-quantile tau of the token's rollout, to -1, far above it.

    DASD, eq. 4 and Table 5 (arXiv:2605.22263): tanh(x), sign(x) or x clipped to [-1, 1], for
    x = (tau - v) / (s + 1e-6), s the rollout's mean absolute deviation.
    """
    values = values.double()
    threshold = quantile(values, share, batch)[batch.rollout_ids]
    scale = mean_absolute_deviation(values, batch)[batch.rollout_ids]
    below = (threshold - values) / (scale + 1e-6)
    match shape:
        case "tanh":
            return below.tanh()
        case "hard":
            return below.sign()
        case "linear":
            return below.clamp(-1.0, 1.0)
