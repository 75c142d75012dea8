"""Credit that the methods share: the group's advantage, DAPO's length penalty, one plain path."""

import torch
from jaxtyping import Int
from torch import Tensor

from megasd.types import (
    Credit,
    PerRollout,
    PerToken,
    ResponseBatch,
    RolloutIndex,
    RolloutMask,
    TokenIndex,
    TokenMask,
)


def per_token(values: PerRollout, rollout_ids: TokenIndex) -> PerToken:
    """Each rollout's value, repeated on its tokens."""
    return values[rollout_ids]


def rewards_differ(rewards: PerRollout, group_ids: RolloutIndex) -> RolloutMask:
    """True where the rollout's group holds two different rewards; never in a group of one."""
    groups, index = torch.unique(group_ids, return_inverse=True)
    empty = rewards.new_zeros(len(groups))
    highest = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
    return (highest != lowest)[index]


def group_advantages(
    rewards: PerRollout, group_ids: RolloutIndex, *, scale_by_std: bool
) -> PerRollout:
    """A_i = (reward_i - mean of the group) / (std of the group + 1e-6), arXiv:2402.03300.

    The std is Bessel's (divides by G - 1). Without `scale_by_std` the division is left out
    (Dr. GRPO, arXiv:2503.20783). A group of equal rewards, and so a group of one, gives exactly 0:
    the mean of equal floats may differ from them, and the std would blow that noise up to +-1.
    Computed in float64, returned in float32.
    """
    groups, index = torch.unique(group_ids, return_inverse=True)
    sizes = torch.bincount(index, minlength=len(groups)).double()
    sums = sizes.new_zeros(len(groups)).index_add(0, index, rewards.double())
    centered = rewards.double() - (sums / sizes)[index]
    advantages = centered
    if scale_by_std:
        squares = sizes.new_zeros(len(groups)).index_add(0, index, centered.square())
        std = (squares / (sizes - 1).clamp(min=1)).sqrt()
        advantages = centered / (std + 1e-6)[index]
    return torch.where(rewards_differ(rewards, group_ids), advantages, 0.0).float()


def overlong_penalty(
    lengths: Int[Tensor, " R"], *, buffer_tokens: float, max_response_tokens: int
) -> PerRollout:
    """Soft overlong punishment, DAPO (arXiv:2503.14476) eq. 13: added to the rewards.

    0 up to max_response_tokens - buffer_tokens, then linear to -1 at max_response_tokens.
    `lengths` count response tokens. In float64: neighbouring lengths must stay apart.
    """
    start = max_response_tokens - buffer_tokens
    return ((start - lengths.double()) / buffer_tokens).clamp(-1.0, 0.0)


def clipped_share(
    log_weights: PerToken, chosen: TokenMask, *, max_deviation: float
) -> dict[str, float]:
    """To log (RLSD, fig. 5c): the share of `chosen` tokens whose w = exp(log_weights) is clipped,
    further from 1 than `max_deviation`; nothing where no token is chosen."""
    if not chosen.any():
        return {}
    is_clipped = (log_weights[chosen].double().exp() - 1).abs() > max_deviation
    return {"weight_clipped": is_clipped.double().mean().item()}


def one_path(
    advantages: PerToken, response_mask: TokenMask, *, zeros_count: bool = False
) -> Credit:
    """Every response token in one average, weight 1.

    Where the loss is only the surrogate, a token of advantage 0 cannot change the update: weight
    0, so its pass can be skipped, while the denominator still counts it. `zeros_count` says that
    the loss has another term there.
    """
    is_used = response_mask if zeros_count else response_mask & (advantages != 0)
    return Credit(advantages, is_used.float(), response_mask.long() - 1)


def on_rollouts(chosen: RolloutMask, batch: ResponseBatch) -> Credit:
    """Weight 1 on the response tokens of the `chosen` rollouts; the others leave the update."""
    is_used = batch.response_mask & chosen[batch.rollout_ids]
    return Credit(torch.zeros_like(is_used.float()), is_used.float(), is_used.long() - 1)
