"""Per-token weights and advantages of the methods that match distributions."""

import torch
from torch import Tensor

from megasd.losses.per_rollout import BLOCK, blocks
from megasd.types import PerToken, RolloutIndex, TokenIndex, TokenMask


def future_credit(
    values: PerToken, counted: TokenMask, rollout_ids: TokenIndex
) -> tuple[PerToken, TokenMask]:
    """C_t = mean of `values` over the counted tokens tau > t of the same rollout, and whether there
    are any; 0 where none follow.

    The cost that a token answers for in DistIL (arXiv:2606.05152, eq. 5), read 0-based. A rollout's
    tokens stand in order; rollouts may stand in any order. Sums are float64.
    """
    credit, has_future = torch.empty_like(values), torch.empty_like(counted)
    for block in blocks(rollout_ids):
        order, _, end = _in_rollouts(rollout_ids[block])
        is_counted = counted[block][order]
        sums = torch.where(is_counted, values[block][order].double(), 0.0).cumsum(dim=0)
        counts = is_counted.long().cumsum(dim=0)
        later_counts = counts[end] - counts
        means = (sums[end] - sums) / later_counts.clamp(min=1)
        order = order + block.start
        credit[order] = torch.where(later_counts > 0, means, 0.0).to(credit.dtype)
        has_future[order] = later_counts > 0
    return credit.float(), has_future


def group_position_mean(
    values: PerToken, counted: TokenMask, rollout_ids: TokenIndex, group_ids: RolloutIndex
) -> PerToken:
    """Mean over the group's counted tokens at the same place in their response; 0 if none is there.

    The place is the token's index in its response; tokens that are not counted keep theirs.
    """
    order, start, _ = _in_rollouts(rollout_ids)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - start
    groups = torch.unique(group_ids, return_inverse=True)[1][rollout_ids]
    _, cells = torch.unique(torch.stack((groups, places)), dim=1, return_inverse=True)
    counts = torch.bincount(cells[counted], minlength=len(cells))
    sums = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    sums = sums.index_add(0, cells[counted], values[counted].double())
    return (sums / counts.clamp(min=1))[cells].float()


def _in_rollouts(rollout_ids: TokenIndex) -> tuple[Tensor, Tensor, Tensor]:
    """An order [N] of the tokens that puts each rollout's side by side, and, in that order, where
    the token's rollout starts and where its last token stands [N]."""
    order = torch.argsort(rollout_ids, stable=True)
    sizes = torch.bincount(rollout_ids)
    ends = sizes.cumsum(dim=0)
    ordered_ids = rollout_ids[order]
    return order, (ends - sizes)[ordered_ids], ends[ordered_ids] - 1


def confidence_weights(
    entropy: PerToken, chosen: TokenMask, minibatch_ids: TokenIndex, *, beta: float
) -> PerToken:
    """exp(-beta H) over its own mean among the `chosen` tokens of the mini-batch; 0 elsewhere.

    The weights of SRPO (arXiv:2604.02288); `minibatch_ids` are per token. The lowest entropy is
    taken out first: the mean is never below 1 / tokens, however large beta H.
    """
    size = int(minibatch_ids.max()) + 1 if len(minibatch_ids) else 0
    highest = torch.full((size,), -torch.inf, dtype=torch.float64, device=entropy.device)
    sums, counts = torch.zeros_like(highest), torch.zeros_like(highest)
    parts = list(zip(*(of.split(BLOCK) for of in (entropy, chosen, minibatch_ids)), strict=True))
    for values, is_chosen, index in parts:
        exponents = torch.where(is_chosen, -beta * values.double(), -torch.inf)
        highest.scatter_reduce_(0, index, exponents, "amax")
        counts.index_add_(0, index, is_chosen.double())

    def raw(values: PerToken, is_chosen: TokenMask, index: TokenIndex) -> Tensor:
        exponents = -beta * values.double() - highest[index]
        return torch.where(is_chosen, exponents.exp(), 0.0)

    for values, is_chosen, index in parts:
        sums.index_add_(0, index, raw(values, is_chosen, index))
    weights = [
        torch.where(is_chosen, raw(values, is_chosen, index) * (counts / sums)[index], 0.0).float()
        for values, is_chosen, index in parts
    ]
    return torch.cat(weights)


def truncated_importance_ratio(
    logprobs: PerToken, old_logprobs: PerToken, *, maximum: float
) -> PerToken:
    """min(rho, maximum) without gradient, rho = exp(logprobs - old); the difference within +-20."""
    return (logprobs.detach() - old_logprobs).clamp(-20.0, 20.0).exp().clamp(max=maximum)
