"""The fused vocabulary head: what one reads of a GPT's output without ever holding its logits.

A model's output layer followed by log-softmax keeps [tokens, vocabulary] values, several times
over. Here the logits exist one block at a time (policy/head/blocks.py); a pass leaves a few
numbers per token, and the backward pass computes every block once more. With logits l (after the
temperature), maximum m, p = softmax(l), target y, and S and U as in blocks.py:

    logprob(y) = l_y - m - log S          d logprob(y) / d l_j = [j = y] - p_j
    entropy = log S - U / S    (nats)     d entropy / d l_j = -p_j (log p_j + entropy)
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from megasd.policy.head.blocks import (
    Cut,
    LogitBlocks,
    Tile,
    TopLogits,
    combine,
    gather,
    input_gradients,
    local_statistics,
    main_grad_of,
    refuse_second_derivative,
)
from megasd.types import PerToken, TokenIndex


class TopIds(NamedTuple):
    """The K most likely ids of each token, falling; of equally likely ones the lower id first."""

    ids: Int[Tensor, "N K"]
    logprobs: Float[Tensor, "N K"]  # without gradient


class HeadOutput(NamedTuple):
    """Per token, float32 (float64 for float64 inputs), the same on every rank of the group."""

    logprobs: PerToken
    entropy: PerToken  # nats, of the full distribution
    at_ids: Float[Tensor, "N K"] | None = None  # log-probs, with gradient
    top: TopIds | None = None


def vocabulary_head(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V_local H"],
    targets: TokenIndex,
    *,
    ids: Int[Tensor, "N K"] | None = None,
    top_k: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> HeadOutput:
    """Log-probs of `targets` and entropy under softmax(hidden @ weight.T / temperature).

    With `ids` also the log-probs at these (`at_ids`; an id may stand in a row twice), with `top_k`
    also the most likely ids, all of them where top_k > vocab_size (`top`): both from the same pass.

    `group` is the tensor-parallel group (None: this rank holds the whole vocabulary). `weight` is
    this rank's shard, ids rank * V_local and up; rows of ids >= vocab_size are padding and take no
    part (gradient 0). Every other argument is the same on all ranks of the group.

    GRADIENT OF `hidden`: EACH RANK RETURNS ITS PARTIAL SUM, over its own vocabulary rows only. The
    true gradient is the sum over the group, left to the caller's region in front of the head
    (copy-to-tensor-parallel: all-reduce; gather-from-sequence-parallel: reduce-scatter). The
    gradient of `weight` is complete. Both come back in the dtype of their input and are
    accumulated in float32.

    Memory beyond inputs and gradients, in float32: two blocks of [chunk_tokens, 8192] (on a GPU
    one, in backward another in the dtype of the inputs), in backward [8192, H] and [N, H].
    Differentiable once: create_graph=True raises.

    A `weight` that Megatron's DDP has wrapped gets its gradient added to its `main_grad`, in
    float32, without the [8192, H].

    Raises ValueError for operands that do not fit together; on a CPU for targets or ids outside
    0 .. vocab_size - 1 too. On a GPU nothing here waits for the device.
    """
    cut = Cut.of(
        hidden,
        weight,
        vocab_size=vocab_size,
        group=group,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    _check_ids("target", targets, vocab_size)
    if ids is not None:
        _check_ids("id", ids, vocab_size)
        ids = ids.long()  # kept as int32 between passes, but indices are int64
    top_k = min(top_k, vocab_size)
    logprobs, entropy, at_ids, *top = _VocabularyHead.apply(
        hidden, weight, targets, ids, top_k, cut, group
    )
    return HeadOutput(logprobs, entropy, at_ids, TopIds(*top) if top_k else None)


@torch.no_grad()
def sample_ids(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V_local H"],
    uniforms: Float[Tensor, "N S"],
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Int[Tensor, "N S"]:
    """S independent draws per token from softmax(hidden @ weight.T / temperature).

    By inverting the cumulative distribution in the order of ids: a draw is the first id at which
    it exceeds its uniform number, of [0, 1). So the cut into chunks and shards changes no draw,
    but one within float rounding of a boundary between two ids. No draw has probability 0.

    Two passes over the vocabulary, the second with one float64 block beside the two float32 ones.
    Arguments as in `vocabulary_head`. Raises ValueError for operands that do not fit together and
    for numbers outside [0, 1) on a CPU.
    """
    cut = Cut.of(
        hidden,
        weight,
        vocab_size=vocab_size,
        group=group,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    outside = ~((uniforms >= 0) & (uniforms < 1))
    if outside.device.type == "cpu" and outside.any():
        position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"uniform number {float(uniforms[*position])} at {position} is outside [0, 1); "
            "draw with torch.rand"
        )
    blocks = LogitBlocks(hidden, weight, cut)
    shards = gather(local_statistics(blocks), group)
    maximum = combine(shards)[0]
    masses = (shards[:, 1] * (shards[:, 0] - maximum).exp()).double()
    ends = masses.cumsum(dim=0)[:, :, None]
    total = ends[-1]
    goals = uniforms.double() * total  # below total, even for the largest number below 1
    rank = 0 if group is None else dist.get_rank(group)
    start = ends[rank - 1] if rank else torch.zeros_like(total)
    is_here = (start <= goals) & (goals < ends[rank])
    ids = _first_above(blocks, maximum, torch.where(is_here, goals - start, -1.0))
    return gather(ids, group).sum(dim=0)


def _first_above(blocks: LogitBlocks, maximum: Tensor, goals: Tensor) -> Tensor:
    """The first local id at which sum exp(l - maximum) exceeds the goal [N, S] of a draw.

    The last id that adds anything where rounding keeps the sum below; 0 where the goal is negative.
    """
    ids = torch.zeros(goals.shape, dtype=torch.int64, device=goals.device)
    missing = goals.clone()  # from the mass of the tiles so far; negative: the draw is found
    for tile in blocks.tiles():
        for tokens in blocks.chunks:
            weights = blocks.logits(tile, tokens).sub_(maximum[tokens, None]).exp_()
            mass = weights.cumsum(dim=1, dtype=torch.float64)
            total = mass[:, -1:].contiguous()
            places = torch.searchsorted(mass, missing[tokens], right=True)
            last = torch.searchsorted(mass, total)
            is_open = (missing[tokens] >= 0) & (total > 0)
            found = tile.first_id + places.minimum(last)
            ids[tokens] = torch.where(is_open, found, ids[tokens])
            missing[tokens] -= total
    return ids


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """On a GPU, which would be waited for, whoever laid the tokens out has checked them."""
    if ids.device.type != "cpu":
        return
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name} {int(ids[*position])} at position {', '.join(map(str, position))} is outside "
            f"the vocabulary of {vocab_size}; does the tokenizer belong to the model?"
        )


class _VocabularyHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ids, top_k, cut, group):
        blocks = LogitBlocks(hidden, weight, cut)
        wanted = targets[:, None] if ids is None else torch.cat((targets[:, None], ids), dim=1)
        top = TopLogits(top_k, blocks) if top_k else None
        statistics = combine(gather(local_statistics(blocks, wanted, top), group))
        maximum, total, moment, target_logit = statistics[:4]
        log_total = total.log()
        at_ids = top_ids = top_logprobs = None
        if ids is not None:
            at_ids = (statistics[4:] - maximum - log_total).T.contiguous()
        if top is not None:
            top_logits, top_ids = top.join(group)
            top_logprobs = top_logits - maximum[:, None] - log_total[:, None]
            ctx.mark_non_differentiable(top_ids, top_logprobs)
        ctx.save_for_backward(hidden, weight, targets, ids, statistics[:3].clone())
        ctx.cut, ctx.main_grad = cut, main_grad_of(weight)
        ctx.set_materialize_grads(False)
        logprobs = target_logit - maximum - log_total
        return logprobs, log_total - moment / total, at_ids, top_ids, top_logprobs

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, grad_at_ids, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        hidden, weight, targets, ids, statistics = ctx.saved_tensors
        blocks = LogitBlocks(hidden, weight, ctx.cut)
        picked = []
        if grad_logprobs is not None:
            picked.append((targets[:, None], grad_logprobs[:, None]))
        if grad_at_ids is not None:
            picked.append((ids, grad_at_ids))
        upstream = _Upstream.of(statistics, picked, grad_entropy, ctx.cut.temperature)
        if blocks.kernels is not None:
            sums = blocks.kernels.sum_over_equal_ids(upstream.ids, upstream.gradients)
            upstream = upstream._replace(gradients=sums)
        gradients = input_gradients(
            blocks,
            hidden,
            weight,
            ctx.needs_input_grad[:2],
            lambda tile, tokens: _logit_gradient(blocks, tile, tokens, upstream),
            ctx.main_grad,
        )
        return *gradients, None, None, None, None, None


class _Upstream(NamedTuple):
    """Per token, what turns shifted logits z = l - maximum into the loss's gradient:

        d loss / d logit_j = exp(z_j) (offset + slope z_j) + sum_k gradient_k [j = id_k]

    With g the sum of the gradients of log-probs, h that of the entropy, all over the temperature:
    offset = (h U / S - g) / S, slope = -h / S.
    """

    maximum: Tensor
    offset: Tensor
    slope: Tensor | None  # None: no gradient reaches the entropy
    ids: Tensor  # [N, K]: those whose log-probs get a gradient
    gradients: Tensor  # [N, K]

    @classmethod
    def of(
        cls,
        statistics: Tensor,
        picked: list[tuple[Tensor, Tensor]],
        grad_entropy: Tensor | None,
        temperature: float,
    ) -> "_Upstream":
        maximum, total, moment = statistics
        none = total.new_empty(len(total), 0)
        ids = torch.cat([none.long(), *(ids for ids, _ in picked)], dim=1)
        gradients = torch.cat([none, *(gradients for _, gradients in picked)], dim=1) / temperature
        offset = -gradients.sum(dim=1) / total
        if grad_entropy is None:
            return cls(maximum, offset, None, ids, gradients)
        slope = -grad_entropy / (temperature * total)
        return cls(maximum, offset - slope * moment / total, slope, ids, gradients)


def _logit_gradient(blocks: LogitBlocks, tile: Tile, tokens: slice, upstream: _Upstream) -> Tensor:
    """The loss's gradient at one block of hidden @ weight.T, ready to multiply."""
    block = blocks.logits(tile, tokens)
    if blocks.kernels is not None:
        gradient = blocks.gradient(block)
        blocks.kernels.logit_gradient(
            block,
            tile.first_id,
            upstream.maximum[tokens],
            upstream.offset[tokens],
            None if upstream.slope is None else upstream.slope[tokens],
            upstream.ids[tokens],
            upstream.gradients[tokens],
            gradient,
        )
        return gradient
    block.sub_(upstream.maximum[tokens, None])
    offset = upstream.offset[tokens, None]
    if upstream.slope is None:
        block.exp_().mul_(offset)
    else:
        weights = torch.exp(block, out=blocks.scratch(block))
        block.mul_(upstream.slope[tokens, None]).add_(offset).mul_(weights)
    places, here = tile.locate(upstream.ids[tokens])
    block.scatter_add_(1, places, upstream.gradients[tokens].where(here, 0.0))
    return block.to(blocks.operand_dtype)
