"""The forward-only pass: log-probs and entropy of every response token, on every rank."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megasd.policy import forward
from megasd.policy.sequences import pack
from megasd.policy.state import PolicyState
from megasd.types import Scores, View


@torch.no_grad()
def score(
    state: PolicyState, views: Sequence[View | None], offsets: np.ndarray, *, temperature: float
) -> Scores:
    """Score the response tokens of `views` [R] under the weights that are in place.

    Tokens of a rollout whose view is None come back as 0. Each token is read by exactly one
    rank, so a sum over the world puts all of response space on every rank, to the bit.
    """
    num_tokens = int(offsets[-1])
    microbatches = pack(
        views,
        offsets,
        torch.ones(num_tokens, dtype=torch.bool),
        max_tokens=state.max_tokens_per_microbatch,
        rank=state.layout.dp_rank,
        num_ranks=state.layout.dp_size,
        multiple=state.length_multiple,
    )
    values = torch.zeros(2, num_tokens, dtype=torch.float32, device=state.device)

    def finish(hidden: torch.Tensor, microbatch: forward.Microbatch) -> None:
        out = state.read_head(hidden, microbatch, temperature)
        if state.layout.speaks:
            values[0, microbatch.tokens] = out.logprobs
            values[1, microbatch.tokens] = out.entropy

    state.ddp.eval()
    forward.run(state.ddp, microbatches, finish, backward=False, device=state.device)
    state.ddp.train()
    dist.all_reduce(values)
    return Scores(values[0], values[1])
