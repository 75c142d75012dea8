"""Credit of which only a part counts: which tokens are learnt from.

Tokens left out leave their path's denominators too. `credit/selected` is the share that stays.
Shares of a count are rounded before they are cut: 0.07 x 100 is 7.000000000000001 in floats.
"""

import math

import torch

from megasd.types import Credit, PerToken, ResponseBatch, TokenMask


def only_tail(credit: Credit, batch: ResponseBatch, *, start: float) -> Credit:
    """Without the first floor(start x length) response tokens of each rollout, the last kept."""
    lengths = torch.bincount(batch.rollout_ids[batch.response_mask], minlength=batch.num_rollouts)
    before = lengths.cumsum(0) - lengths
    position = batch.response_mask.cumsum(0) - 1 - before[batch.rollout_ids]
    left_out = (start * lengths.double()).round(decimals=6).floor().minimum(lengths - 1)
    return _only(credit, position >= left_out[batch.rollout_ids])


def only_highest_entropy(credit: Credit, batch: ResponseBatch, *, share: float) -> Credit:
    """Of each mini-batch's n tokens the ceil(share x n), at least 1, of highest old entropy.

    n counts the tokens that `credit` counts; of equal entropies those that come first stay.
    """
    assert batch.entropy is not None  # promised by the loop where `needs.entropy`
    stays = torch.zeros_like(batch.response_mask)
    for minibatch in range(int(batch.minibatch_ids.max()) + 1):
        inside = (batch.minibatch_ids == minibatch)[batch.rollout_ids] & (credit.path >= 0)
        entropy = batch.entropy[inside]
        if len(entropy):
            size = max(1, math.ceil(round(share * len(entropy), 6)))
            stays[inside] = _highest(entropy, size)
    return _only(credit, stays)


def _highest(values: PerToken, size: int) -> TokenMask:
    """Which are the `size` highest; of equal ones those that come first."""
    lowest = values.topk(size, sorted=False).values.min()
    chosen = values > lowest
    ties = (values == lowest).nonzero()[:, 0]
    chosen[ties[: size - int(chosen.sum())]] = True
    return chosen


def with_entropy_bonus(
    credit: Credit, batch: ResponseBatch, *, alpha: float, kappa: float
) -> Credit:
    """A_hat = A + min(alpha H, |A| / kappa), arXiv:2506.14758; H the old entropy in nats.

    With `kappa` above 1 no sign changes, and 0 stays 0.
    """
    assert batch.entropy is not None
    bonus = torch.minimum(alpha * batch.entropy, credit.advantages.abs() / kappa)
    counted = credit.path >= 0
    mean = bonus[counted].double().mean().item() if counted.any() else 0.0
    return credit._replace(
        advantages=credit.advantages + bonus, metrics={**credit.metrics, "entropy_bonus": mean}
    )


def _only(credit: Credit, stays: TokenMask) -> Credit:
    counted = credit.path >= 0
    share = int((counted & stays).sum()) / max(1, int(counted.sum()))
    return credit._replace(
        path=torch.where(stays, credit.path, -1),
        metrics={**credit.metrics, "selected": share},
    )
