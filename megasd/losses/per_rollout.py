"""Statistics of each rollout over its own response tokens, many rollouts in one pass.

Computed and returned in float64, in which a whole batch would take tens of bytes per token: a block
of rollouts is looked at after the other. 0 for a rollout without response tokens.
"""

from collections.abc import Callable
from typing import Literal

import torch

from megasd.types import PerRollout, PerToken, ResponseBatch, TokenIndex

BLOCK = 2**22  # tokens, about, that are looked at in float64 at a time


def blocks(rollout_ids: TokenIndex) -> list[slice]:
    """The tokens in blocks of whole rollouts; one of all where rollouts do not stand in order."""
    if len(rollout_ids) <= BLOCK or (rollout_ids[1:] < rollout_ids[:-1]).any():
        return [slice(0, len(rollout_ids))]
    found, start = [], 0
    ends = torch.bincount(rollout_ids).cumsum(0).tolist()
    for end, following in zip(ends, [*ends[1:], len(rollout_ids) + BLOCK + 1], strict=True):
        if end > start and following - start > BLOCK:
            found.append(slice(start, end))
            start = end
    return found


def quantile(values: PerToken, share: float, batch: ResponseBatch) -> PerRollout:
    """The `share`-quantile of each rollout, linear between the two nearest values.

    Share 0.5 is the median: of an even count, the mean of the middle two.
    """
    found = torch.zeros(batch.num_rollouts, dtype=torch.float64, device=values.device)
    for block in blocks(batch.rollout_ids):
        chosen = batch.response_mask[block]
        rollout_ids = batch.rollout_ids[block][chosen]
        ascending, order = values[block][chosen].double().sort()
        # Two sorts, the second stable: rollout by rollout, ascending within each. The last zero is
        # what a rollout without tokens at the end of the batch finds.
        rollout_ids, order = rollout_ids[order].sort(stable=True)
        ranked = torch.cat([ascending[order], ascending.new_zeros(1)])
        lengths = torch.bincount(rollout_ids, minlength=batch.num_rollouts)
        starts = lengths.cumsum(0) - lengths
        place = share * (lengths - 1).clamp(min=0).double()
        below, above = (ranked[starts + bound.long()] for bound in (place.floor(), place.ceil()))
        found += torch.where(lengths > 0, torch.lerp(below, above, place.frac()), 0.0)
    return found


def mean(values: PerToken, batch: ResponseBatch) -> PerRollout:
    """The mean of each rollout."""
    return _mean(batch, lambda block: values[block].double())


def mean_absolute_deviation(values: PerToken, batch: ResponseBatch) -> PerRollout:
    """mean |v - mean v| of each rollout."""
    centre = mean(values, batch)
    return _mean(
        batch, lambda block: (values[block].double() - centre[batch.rollout_ids[block]]).abs()
    )


def _mean(batch: ResponseBatch, values: Callable[[slice], PerToken]) -> PerRollout:
    sums = torch.zeros(batch.num_rollouts, dtype=torch.float64, device=batch.rollout_ids.device)
    counts = torch.zeros_like(sums)
    for block in blocks(batch.rollout_ids):
        chosen = batch.response_mask[block]
        rollout_ids = batch.rollout_ids[block][chosen]
        sums.index_add_(0, rollout_ids, values(block)[chosen])
        counts += torch.bincount(rollout_ids, minlength=len(counts))
    return sums / counts.clamp(min=1)


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
    threshold = quantile(values, share, batch)
    scale = mean_absolute_deviation(values, batch) + 1e-6
    routed = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    for block in blocks(batch.rollout_ids):
        rollout_ids = batch.rollout_ids[block]
        below = (threshold[rollout_ids] - values[block].double()) / scale[rollout_ids]
        match shape:
            case "tanh":
                routed[block] = below.tanh()
            case "hard":
                routed[block] = below.sign()
            case "linear":
                routed[block] = below.clamp(-1.0, 1.0)
    return routed
