"""One optimizer step over a mini-batch: loss per token, summed with global weights, clipped."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megasd.algorithms.base import Algorithm
from megasd.losses.config import MismatchConfig
from megasd.losses.mismatch import (
    mismatch_ratio,
    mismatch_weights,
    sequence_mismatch_ratio,
)
from megasd.losses.reduce import reduction_weights
from megasd.policy import forward
from megasd.policy.head.divergence import full_divergence
from megasd.policy.head.head import HeadOutput
from megasd.policy.rows import whole_rows
from megasd.policy.state import PolicyState
from megasd.process import together
from megasd.types import (
    Credit,
    DivergenceKind,
    PerToken,
    PerTokenAndId,
    ResponseBatch,
    StudentOutput,
    TeacherHidden,
    TokenLoss,
    View,
)
from megasd.weights.layout import stage_layers

# Stepped; skipped: loss or gradient norm was not finite; empty: no token had a weight.
UpdateOutcome = Literal["stepped", "skipped", "empty"]


class _PackedStudent(StudentOutput):
    """The head's output on the tokens of one micro-batch."""

    def __init__(
        self,
        state: PolicyState,
        hidden: Tensor,
        out: HeadOutput,
        teacher: TeacherHidden | None,
        temperature: float,
    ) -> None:
        self._state, self._hidden, self._out = state, hidden, out
        self._teacher, self._temperature = teacher, temperature

    @property
    def vocab_size(self) -> int:
        return self._state.vocab_size

    @property
    def logprobs(self) -> PerToken:
        return self._out.logprobs

    @property
    def entropy(self) -> PerToken:
        return self._out.entropy

    @property
    def support_logprobs(self) -> PerTokenAndId:
        assert self._out.at_ids is not None, "the algorithm's needs name no support"
        return self._out.at_ids

    def full_divergence(
        self, kind: DivergenceKind, *, alpha: float, entry_clip: float | None
    ) -> PerToken:
        assert self._teacher is not None, "the algorithm's needs name no teacher_hidden"
        state = self._state
        return full_divergence(
            self._hidden,
            state.gpt.head_weight,
            self._teacher.hidden,
            self._teacher.weight,
            kind=kind,
            alpha=alpha,
            entry_clip=entry_clip,
            vocab_size=state.vocab_size,
            group=state.head_group,
            temperature=self._temperature,
            chunk_tokens=state.head_chunk_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What became of one mini-batch; but for `stepped`, everything is as it was before.

    `logprobs` and `entropy` [N] at its start, where `read`, are kept where nothing else has read
    them before the update; of other steps that are skipped by the first rank, which leaves the
    bundle, and in the host's memory: a step may have many.
    """

    outcome: UpdateOutcome
    metrics: dict[str, float]
    bad_gradients: Mapping[str, int]  # where skipped, on this rank: see `_bad_gradients`
    logprobs: PerToken | None = None
    entropy: PerToken | None = None
    read: Tensor | None = None

    @property
    def skipped(self) -> bool:
        return self.outcome == "skipped"


def token_weights(
    algorithm: Algorithm,
    batch: ResponseBatch,
    credit: Credit,
    minibatch: int,
    mismatch: MismatchConfig,
) -> PerToken:
    """What each token's loss is multiplied by: [N], 0 outside mini-batch `minibatch`.

    The denominators are of the whole mini-batch, over all ranks and micro-batches (law 2). The
    mismatch's weight is in it where the old log-probs are known before the update.
    """
    inside = (batch.minibatch_ids == minibatch)[batch.rollout_ids]
    weights = credit.token_weights
    if batch.old_logprobs is not None and _corrects(batch, mismatch):
        correction, stays = _mismatch(batch, batch.old_logprobs, mismatch)
        weights, inside = weights * correction, inside & stays
    share = reduction_weights(
        algorithm.reduction,
        torch.where(inside & batch.response_mask, credit.path, -1),
        batch.rollout_ids,
        num_rollouts=batch.num_rollouts,
        max_response_tokens=batch.max_response_tokens,
    )
    return share * weights


def _corrects(batch: ResponseBatch, mismatch: MismatchConfig) -> bool:
    return mismatch.level != "off" and batch.rollout_logprobs is not None


def _mismatch(
    batch: ResponseBatch, old_logprobs: PerToken, mismatch: MismatchConfig
) -> tuple[PerToken, Tensor]:
    assert batch.rollout_logprobs is not None
    if mismatch.level == "sequence":
        ratio = sequence_mismatch_ratio(
            old_logprobs,
            batch.rollout_logprobs,
            batch.response_mask,
            batch.rollout_ids,
            num_rollouts=batch.num_rollouts,
        )
    else:
        ratio = mismatch_ratio(old_logprobs, batch.rollout_logprobs)
    return mismatch_weights(ratio, mismatch)


def update(
    state: PolicyState,
    views: Sequence[View | None],
    offsets: np.ndarray,
    batch: ResponseBatch,
    credit: Credit,
    algorithm: Algorithm,
    *,
    minibatch: int,
    temperature: float,
    mismatch: MismatchConfig,
    lr: float,
) -> UpdateResult:
    """Gradient of sum(token loss x token weight) over mini-batch `minibatch`, then a step at `lr`.

    Without `batch.old_logprobs` the old ones are the first forward's own, without gradient. A
    step whose loss or gradient norm is not finite is skipped, on all ranks: nothing changes. Nor
    does it where no token has a weight, as the ranks know before they run anything: Adam would
    move the weights by its moments alone.
    """
    weights = token_weights(algorithm, batch, credit, minibatch, mismatch)
    read = (weights != 0).cpu()
    if not read.any():
        return UpdateResult(outcome="empty", metrics={"tokens_in_update": 0.0}, bad_gradients={})
    owners = None if batch.owners is None else batch.owners.cpu().numpy()
    microbatches = state.pack(views, offsets, read, owners)
    seen: list[tuple[Tensor, PerToken, PerToken]] = []
    sums: dict[str, Tensor] = {}

    def finish(hidden: Tensor, microbatch: forward.Microbatch) -> tuple[Tensor, None]:
        tokens, part = microbatch.tokens, whole_rows(batch.at(microbatch.tokens), state.head_group)
        hidden = forward.rows_read(hidden, microbatch, state.layout)
        ids = None if part.support is None else part.support.ids
        out = state.read_head(hidden, microbatch.targets, temperature, ids=ids)
        student = _PackedStudent(state, hidden, out, part.teacher_hidden, temperature)
        result = _token_loss(student, part, credit.at(tokens), algorithm, mismatch)
        total = (result.loss * weights[tokens]).sum()
        if state.layout.speaks:
            seen.append((tokens, out.logprobs.detach(), out.entropy.detach()))
            values_to_log = {"loss": total, "entropy": out.entropy, **result.metrics}
            for name, value in values_to_log.items():
                addend = value.detach().double().sum()
                sums[name] = sums[name] + addend if name in sums else addend
        return total, None

    state.ddp.zero_grad_buffer()
    state.optimizer.zero_grad()
    with state.precision(backward=True):
        forward.run(state.ddp, microbatches, finish, backward=True, device=state.device)
    result = _finish(state, sums, int(read.sum()), lr)
    is_first_reading = batch.old_logprobs is None
    if not (result.skipped or is_first_reading):
        return result  # nobody asks what the tokens' values were
    logprobs, entropy = _on_every_rank(seen, len(read), state.device)
    if is_first_reading:
        return replace(result, logprobs=logprobs, entropy=entropy, read=read.to(state.device))
    if dist.get_rank() == 0:
        return replace(result, logprobs=logprobs.cpu(), entropy=entropy.cpu(), read=read)
    return result


def _token_loss(
    student: StudentOutput,
    batch: ResponseBatch,
    credit: Credit,
    algorithm: Algorithm,
    mismatch: MismatchConfig,
) -> TokenLoss:
    """The algorithm's loss on one micro-batch; without old log-probs, they are its own.

    A micro-batch without tokens takes part in the collectives only: a method may not even have
    what it needs, where no rollout of the batch has a context.
    """
    if not len(batch.rollout_ids):
        return TokenLoss(student.logprobs, {})
    if batch.old_logprobs is not None:
        return algorithm.token_loss(student, batch, credit)
    old = student.logprobs.detach()
    result = algorithm.token_loss(student, replace(batch, old_logprobs=old), credit)
    if not _corrects(batch, mismatch):
        return result
    assert not mismatch.needs_old_logprobs, "the reader scores the old policy for these"
    correction, _ = _mismatch(batch, old, mismatch)
    return TokenLoss(result.loss * correction, result.metrics)


def _finish(
    state: PolicyState, sums: Mapping[str, Tensor], num_tokens: int, lr: float
) -> UpdateResult:
    """After the backward passes: sums over the ranks, the optimizer's step, what came of both."""
    metrics = _averages(sums, num_tokens=num_tokens)
    norm, stepped = _step(state, loss=metrics["loss"], lr=lr)
    metrics |= {"grad_norm": norm, "lr": lr, "tokens_in_update": float(num_tokens)}
    return UpdateResult(
        outcome="stepped" if stepped else "skipped",
        metrics=metrics,
        bad_gradients={} if stepped else _bad_gradients(state),
    )


def _on_every_rank(
    seen: Iterable[tuple[Tensor, PerToken, PerToken]], num_tokens: int, device: torch.device
) -> tuple[PerToken, PerToken]:
    """What one rank has `seen` of each token, by its place; called by every rank."""
    logprobs, entropy = (torch.zeros(num_tokens, device=device) for _ in range(2))
    for tokens, their_logprobs, their_entropy in seen:
        logprobs[tokens], entropy[tokens] = their_logprobs, their_entropy
    dist.all_reduce(logprobs)
    dist.all_reduce(entropy)
    return logprobs, entropy


def _step(state: PolicyState, *, loss: float, lr: float) -> tuple[float, bool]:
    """Clip by the global norm and step; (norm before clipping, whether the step was made).

    Norm and loss are of all ranks, so all step or none. Megatron's own step, which clips and
    steps as each kind of optimizer wants it, takes the same norm again.
    """
    optimizer = state.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(norm) and math.isfinite(loss)):
        return norm, False
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm, True


def _bad_gradients(state: PolicyState) -> dict[str, int]:
    """By parameter, in the order of the forward pass: how many values are not finite, where any.

    Read from Megatron's `main_grad`: in the shard that this rank's optimizer owns it is the sum
    over the data-parallel ranks, in the rest what this rank alone has added. Layers are numbered
    within the model, experts within the rank.
    """
    layers = stage_layers(state.gpt.config.num_layers, state.layout.pp_rank, state.layout.pp_size)
    found = {}
    for name, parameter in state.gpt.named_parameters():
        gradient: Tensor | None = getattr(parameter, "main_grad", None)
        if gradient is None:  # frozen
            continue
        if count := gradient.numel() - int(gradient.isfinite().sum()):
            place = re.match(r"decoder\.layers\.(\d+)", name)
            if place:
                name = f"decoder.layers.{int(place[1]) + layers.start}{name[place.end() :]}"
            found[name] = count
    return found


def _averages(sums: Mapping[str, Tensor], *, num_tokens: int) -> dict[str, float]:
    """The loss summed, metrics averaged over the tokens read, from the ranks that speak."""
    here = torch.stack([*sums.values()]).tolist() if sums else []
    everywhere = together.from_every_rank(dict(zip(sums, here, strict=True)))
    names = sorted({name for one in everywhere for name in one})
    totals = {name: _sum(one.get(name, 0.0) for one in everywhere) for name in names}
    return {n: t if n == "loss" else t / num_tokens for n, t in totals.items()}


def _sum(values: Iterable[float]) -> float:
    """`math.fsum`, which would raise where infinities of both signs meet: not a number."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
