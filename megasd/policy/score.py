"""The forward-only pass: what a model thinks of every response token.

Numbers per token come to every rank. Rows of K ids or of a hidden state per token never travel:
they stay on the ranks that read the token, those of the last stage.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megasd.losses.divergence import cross_entropy
from megasd.policy import forward
from megasd.policy.sequences import Microbatch, pack
from megasd.policy.state import ModelState
from megasd.policy.uniforms import uniforms
from megasd.types import PerToken, Reads, Scores, Support, TeacherHidden, View


@torch.no_grad()
def score(
    state: ModelState,
    views: Sequence[View | None],
    offsets: np.ndarray,
    *,
    temperature: float,
    reads: Reads | None = None,
    owners: np.ndarray | None = None,
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
        owners=owners,
    )
    reading = _Reading(state, reads or Reads(), num_tokens, temperature)
    state.runnable.eval()
    with state.precision(backward=False):
        forward.run(state.runnable, microbatches, reading.read, backward=False, device=state.device)
    state.runnable.train()
    return reading.scores()


class _Reading:
    """One pass: gathers what the micro-batches give."""

    def __init__(
        self, state: ModelState, reads: Reads, num_tokens: int, temperature: float
    ) -> None:
        self.state, self.reads, self.temperature = state, reads, temperature
        # A tensor each, and only of what is asked for: whoever keeps one keeps no other.
        asked = ["logprobs", "entropy", *(["cross_entropy"] if reads.cross_entropy else [])]
        device = state.device
        self.values = {
            n: torch.zeros(num_tokens, dtype=torch.float32, device=device) for n in asked
        }
        self.index = None
        if reads.leaves_rows:
            self.index = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
        self.rows: dict[str, list[Tensor]] = {"ids": [], "logprobs": [], "hidden": []}
        self.num_rows = 0

    def read(self, hidden: Tensor, microbatch: Microbatch) -> None:
        """Called on the last stage with the final hidden states of a micro-batch."""
        state, reads, tokens = self.state, self.reads, microbatch.tokens
        hidden = forward.rows_read(hidden, microbatch, state.layout)
        support = None if reads.support is None else reads.support.at(tokens)
        out = state.read_head(
            hidden,
            microbatch.targets,
            self.temperature,
            ids=None if support is None else support.ids,
            top_k=reads.top_k,
        )
        if state.layout.speaks:
            self.values["logprobs"][tokens] = out.logprobs
            self.values["entropy"][tokens] = out.entropy
        if self.index is not None:
            self.index[tokens] = torch.arange(len(tokens), device=tokens.device) + self.num_rows
            self.num_rows += len(tokens)
        if support is not None:
            assert out.at_ids is not None
            if not reads.cross_entropy:
                self._keep(ids=support.ids.int(), logprobs=out.at_ids)
            elif state.layout.speaks:
                self.values["cross_entropy"][tokens] = self._cross_entropy(out.at_ids, support)
        elif out.top is not None:
            self._keep(ids=out.top.ids.int(), logprobs=out.top.logprobs)
        elif reads.samples:
            draws = uniforms(reads.seed, tokens, reads.samples)
            self._keep(ids=state.sample_ids(hidden, draws, self.temperature).int())
        if reads.hidden:
            self._keep(hidden=hidden)

    def _keep(self, **rows: Tensor) -> None:
        for name, values in rows.items():
            self.rows[name].append(values)

    def _cross_entropy(self, logprobs: Tensor, support: Support) -> PerToken:
        if support.teacher_logprobs is None:
            return -logprobs.mean(dim=1)
        return cross_entropy(
            logprobs, support.teacher_logprobs, rest="tail", vocab_size=self.state.vocab_size
        )

    def scores(self) -> Scores:
        """The pass as a whole; called by every rank."""
        for values in self.values.values():
            dist.all_reduce(values)
        return Scores(
            logprobs=self.values["logprobs"],
            entropy=self.values["entropy"],
            cross_entropy=self.values.get("cross_entropy"),
            support=self._support(),
            hidden=self._hidden() if self.reads.hidden else None,
        )

    def _support(self) -> Support | None:
        reads, device = self.reads, self.state.device
        if reads.cross_entropy:
            return None
        asked = reads.samples or min(reads.top_k, self.state.vocab_size)
        size = asked if reads.support is None else reads.support.ids.shape[1]
        if not size:
            return None
        # The last row, for tokens that have none: finite, and never looked at.
        ids = torch.zeros(1, size, dtype=torch.int32, device=device)
        flat = torch.full((1, size), -math.log(self.state.vocab_size), device=device)
        return Support(
            ids=torch.cat([*self.rows["ids"], ids]),
            teacher_logprobs=None if reads.samples else torch.cat([*self.rows["logprobs"], flat]),
            index=self.index,
        )

    def _hidden(self) -> TeacherHidden | None:
        if not self.state.layout.is_last_stage:
            return None
        weight = self.state.gpt.head_weight.detach().clone()  # it may be the student's, who learns
        last = weight.new_zeros(1, weight.shape[1])
        return TeacherHidden(
            hidden=torch.cat([*self.rows["hidden"], last]), weight=weight, index=self.index
        )
