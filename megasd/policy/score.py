"""The forward-only pass: what a model thinks of every response token.

Numbers per token come to every rank. Rows of K ids or of a hidden state per token never travel:
they stay on the ranks that read the token, those of the last stage, each with a share of their
columns (policy/rows.py).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megasd.losses.divergence import cross_entropy
from megasd.policy import forward
from megasd.policy.rows import KeptRows, whole_support
from megasd.policy.sequences import Microbatch
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
    weights_stay: bool = False,
) -> Scores:
    """Score the response tokens of `views` [R] under the weights that are in place.

    Tokens of a rollout whose view is None come back as 0. Each token is read by exactly one
    rank, so a sum over the world puts all of response space on every rank, to the bit.
    `weights_stay`: their memory keeps them as long as the scores are used.
    """
    num_tokens = int(offsets[-1])
    microbatches = state.pack(views, offsets, torch.ones(num_tokens, dtype=torch.bool), owners)
    num_rows = sum(len(one.tokens) for one in microbatches) if state.layout.is_last_stage else 0
    reading = _Reading(state, reads or Reads(), num_tokens, num_rows, temperature)
    state.runnable.eval()
    with state.precision(backward=False):
        forward.run(state.runnable, microbatches, reading.read, backward=False, device=state.device)
    state.runnable.train()
    return reading.scores(weights_stay=weights_stay)


class _Reading:
    """One pass: gathers what the micro-batches give."""

    def __init__(
        self,
        state: ModelState,
        reads: Reads,
        num_tokens: int,
        num_rows: int,  # of them, that this rank reads itself
        temperature: float,
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
            self.index = torch.full((num_tokens,), -1, dtype=torch.int32, device=device)
        self.num_ids = self._num_ids()
        self.kept = {
            name: KeptRows(
                num_rows, width, last=last, dtype=dtype, device=device, group=state.head_group
            )
            for name, width, last, dtype in self._rows()
        }
        self.num_read = 0

    def _num_ids(self) -> int:
        """K of the support that the pass leaves; 0 where it leaves none."""
        reads = self.reads
        if reads.support is None:
            return reads.samples or min(reads.top_k, self.state.vocab_size)
        if reads.cross_entropy:
            return 0
        return reads.support.num_ids or reads.support.ids.shape[1]

    def _rows(self) -> Iterator[tuple[str, int, float, torch.dtype]]:
        """What is kept: name, width, a finite value that nobody looks at, dtype."""
        if self.num_ids:
            yield "ids", self.num_ids, 0, torch.int32
            if not self.reads.samples:
                flat = -math.log(self.state.vocab_size)
                yield "logprobs", self.num_ids, flat, torch.float32
        if self.reads.hidden:
            config = self.state.gpt.config
            yield "hidden", config.hidden_size, 0, config.params_dtype

    def read(self, hidden: Tensor, microbatch: Microbatch) -> None:
        """Called on the last stage with the final hidden states of a micro-batch."""
        state, reads, tokens = self.state, self.reads, microbatch.tokens
        hidden = forward.rows_read(hidden, microbatch, state.layout)
        support = None
        if reads.support is not None:
            support = whole_support(reads.support.at(tokens), state.head_group)
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
            end = self.num_read + len(tokens)
            self.index[tokens] = torch.arange(
                self.num_read, end, dtype=torch.int32, device=tokens.device
            )
            self.num_read = end
        if support is not None:
            assert out.at_ids is not None
            if not reads.cross_entropy:
                self._keep(ids=support.ids, logprobs=out.at_ids)
            elif state.layout.speaks:
                self.values["cross_entropy"][tokens] = self._cross_entropy(out.at_ids, support)
        elif out.top is not None:
            self._keep(ids=out.top.ids, logprobs=out.top.logprobs)
        elif reads.samples:
            draws = uniforms(reads.seed, tokens, reads.samples)
            self._keep(ids=state.sample_ids(hidden, draws, self.temperature))
        if reads.hidden:
            self._keep(hidden=hidden)

    def _keep(self, **rows: Tensor) -> None:
        for name, values in rows.items():
            self.kept[name].add(values)

    def _cross_entropy(self, logprobs: Tensor, support: Support) -> PerToken:
        if support.teacher_logprobs is None:
            return -logprobs.mean(dim=1)
        return cross_entropy(
            logprobs, support.teacher_logprobs, rest="tail", vocab_size=self.state.vocab_size
        )

    def scores(self, *, weights_stay: bool) -> Scores:
        """The pass as a whole; called by every rank."""
        for values in self.values.values():
            dist.all_reduce(values)
        return Scores(
            logprobs=self.values["logprobs"],
            entropy=self.values["entropy"],
            cross_entropy=self.values.get("cross_entropy"),
            support=self._support() if self.num_ids else None,
            hidden=self._hidden(weights_stay) if self.reads.hidden else None,
        )

    def _support(self) -> Support:
        logprobs = self.kept.get("logprobs")
        return Support(
            ids=self.kept["ids"].values,
            teacher_logprobs=None if logprobs is None else logprobs.values,
            index=self.index,
            num_ids=self.num_ids,
        )

    def _hidden(self, weights_stay: bool) -> TeacherHidden | None:
        if not self.state.layout.is_last_stage:
            return None
        weight = self.state.gpt.head_weight.detach()
        return TeacherHidden(
            hidden=self.kept["hidden"].values,
            weight=weight if weights_stay else weight.clone(),
            index=self.index,
        )
