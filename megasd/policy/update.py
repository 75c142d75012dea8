"""One optimizer step over a mini-batch: loss per token, summed with global weights, clipped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megasd.algorithms.base import Algorithm
from megasd.losses.config import MismatchConfig
from megasd.losses.mismatch import mismatch_weights
from megasd.losses.reduce import reduction_weights
from megasd.policy import forward
from megasd.policy.head import HeadOutput
from megasd.policy.sequences import pack
from megasd.policy.state import PolicyState
from megasd.types import Credit, PerToken, ResponseBatch, StudentOutput, TokenLoss, View


class _PackedStudent(StudentOutput):
    """The head's output on the tokens of one micro-batch."""

    def __init__(self, out: HeadOutput) -> None:
        self._out = out

    @property
    def logprobs(self) -> PerToken:
        return self._out.logprobs

    @property
    def entropy(self) -> PerToken:
        return self._out.entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """One optimizer step; `logprobs` and `entropy` [N] are those at its start, where `read`."""

    metrics: dict[str, float]
    skipped: bool  # a non-finite gradient norm: weights and optimizer state are as before
    logprobs: PerToken
    entropy: PerToken
    read: Tensor


def token_weights(
    algorithm: Algorithm, batch: ResponseBatch, credit: Credit, minibatch: int
) -> PerToken:
    """What each token's loss is multiplied by: [N], 0 outside mini-batch `minibatch`.

    The denominators are of the whole mini-batch, over all ranks and micro-batches (law 2).
    """
    inside = batch.minibatch_ids[batch.rollout_ids] == minibatch
    path = torch.where(inside & batch.response_mask, credit.path, -1)
    share = reduction_weights(
        algorithm.reduction,
        path,
        batch.rollout_ids,
        num_rollouts=batch.num_rollouts,
        max_response_tokens=batch.max_response_tokens,
    )
    return share * credit.token_weights


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
) -> UpdateResult:
    """Gradient of sum(token loss x token weight) over mini-batch `minibatch`, then one step.

    Without `batch.old_logprobs` the old ones are the first forward's own, without gradient. A
    step whose gradient norm is not finite is skipped: nothing changes, and it is counted.
    """
    weights = token_weights(algorithm, batch, credit, minibatch)
    read = weights != 0
    microbatches = pack(
        views,
        offsets,
        read,
        max_tokens=state.max_tokens_per_microbatch,
        rank=state.layout.dp_rank,
        num_ranks=state.layout.dp_size,
        multiple=state.length_multiple,
    )
    values = torch.zeros(2, batch.rollout_ids.shape[0], dtype=torch.float32, device=state.device)
    sums: dict[str, Tensor] = {}

    def finish(hidden: Tensor, microbatch: forward.Microbatch) -> tuple[Tensor, None]:
        out = state.read_head(hidden, microbatch, temperature)
        tokens = microbatch.tokens
        result = _token_loss(out, batch.at(tokens), credit.at(tokens), algorithm, mismatch)
        total = (result.loss * weights[tokens]).sum()
        if state.layout.speaks:
            values[0, tokens] = out.logprobs.detach()
            values[1, tokens] = out.entropy.detach()
            for name, value in {"loss": total, **result.metrics}.items():
                addend = value.detach().double().sum()
                sums[name] = sums[name] + addend if name in sums else addend
        return total, None

    state.ddp.zero_grad_buffer()
    state.optimizer.zero_grad()
    forward.run(state.ddp, microbatches, finish, backward=True, device=state.device)
    dist.all_reduce(values)
    grad_norm, skipped = _step(state)
    metrics = _averages(sums, num_tokens=max(1, int(read.sum())))
    metrics |= {
        "grad_norm": grad_norm,
        "lr": float(state.optimizer.param_groups[0]["lr"]),
        "tokens_in_update": float(read.sum()),
    }
    return UpdateResult(
        metrics=metrics, skipped=skipped, logprobs=values[0], entropy=values[1], read=read
    )


def _token_loss(
    out: HeadOutput,
    batch: ResponseBatch,
    credit: Credit,
    algorithm: Algorithm,
    mismatch: MismatchConfig,
) -> TokenLoss:
    """The algorithm's loss on one micro-batch, corrected for the engine's other log-probs."""
    old = out.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    batch = replace(batch, old_logprobs=old)
    result = algorithm.token_loss(_PackedStudent(out), batch, credit)
    if mismatch.level == "off" or batch.rollout_logprobs is None:
        return result
    correction = mismatch_weights(old, batch.rollout_logprobs, clip=mismatch.clip)
    return TokenLoss(result.loss * correction, result.metrics)


def _step(state: PolicyState) -> tuple[float, bool]:
    """Clip by the global norm and step; (norm before clipping, whether the step was skipped)."""
    state.scheduler.step(1)
    state.optimizer.prepare_grads()
    norm = float(state.optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, True
    for part in state.optimizer.chained_optimizers:
        max_norm = part.config.clip_grad
        parameters: list[Tensor] = list(part.get_parameters())
        if max_norm > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=norm)
    state.optimizer.step_with_ready_grads()
    return norm, False


def _averages(sums: Mapping[str, Tensor], *, num_tokens: int) -> dict[str, float]:
    """The loss summed, metrics averaged over the tokens read, from the ranks that speak."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {name: float(value) for name, value in sums.items()})
    names = sorted({name for one in everywhere for name in one})
    totals = {name: math.fsum(one.get(name, 0.0) for one in everywhere) for name in names}
    return {n: t if n == "loss" else t / num_tokens for n, t in totals.items()}
