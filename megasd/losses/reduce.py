"""From per-token to scalar: the only place that divides by a number of tokens or rollouts."""

from typing import Literal, assert_never

import torch

from megasd.types import PerToken, TokenIndex

Reduction = Literal["token_mean", "sequence_mean", "constant"]


def reduction_weights(
    reduction: Reduction,
    path: TokenIndex,
    rollout_ids: TokenIndex,
    *,
    num_rollouts: int,
    max_response_tokens: int,
) -> PerToken:
    """Weight of every token of ONE global mini-batch: its loss is sum(token_loss x weight).

    `num_rollouts` bounds `rollout_ids`; `path` is `Credit.path`. Every path p >= 0 has its own
    denominators, over its own tokens; path -1 weighs 0. With length_i = tokens of rollout i in p
    and R = rollouts with length_i > 0:

    - token_mean (DAPO, arXiv:2503.14476): 1 / sum_i length_i
    - sequence_mean (GRPO, arXiv:2402.03300): 1 / (length_i R)
    - constant (Dr. GRPO, arXiv:2503.20783): 1 / (max_response_tokens R)

    A path's weights sum to 1, but `constant` ones to mean length / max_response_tokens.
    Each is the float64 quotient rounded once to float32.
    """
    counts = path >= 0
    num_paths = max(1, int(path.max()) + 1) if len(path) else 1
    # In tables of [paths, rollouts].
    place = path.clamp(min=0).mul_(num_rollouts).add_(rollout_ids)
    lengths = torch.zeros(num_paths * num_rollouts, dtype=torch.int32, device=path.device)
    lengths = lengths.index_add_(0, place, counts.int()).view(num_paths, num_rollouts).double()
    counted_rollouts = (lengths > 0).sum(dim=1, keepdim=True)
    match reduction:
        case "token_mean":
            denominators = lengths.sum(dim=1, keepdim=True).expand_as(lengths)
        case "sequence_mean":
            denominators = lengths * counted_rollouts
        case "constant":
            denominators = (max_response_tokens * counted_rollouts).double().expand_as(lengths)
        case _:
            assert_never(reduction)
    return torch.where(counts, (1.0 / denominators).float().flatten()[place], 0.0)
