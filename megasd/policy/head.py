"""The fused vocabulary head: log-probs and entropy of a GPT without ever holding its logits.

A model's output layer followed by log-softmax keeps [tokens, vocabulary] values, several times
over. Here the logits exist one block at a time, [chunk_tokens, 8192 rows of the vocabulary]; a
pass leaves four numbers per token, and the backward pass computes every block once more. With
logits l (after the temperature), maximum m, p = softmax(l), target y:

    total  S = sum_j exp(l_j - m)             logprob = l_y - m - log S
    moment U = sum_j exp(l_j - m) (l_j - m)   entropy = log S - U / S        (nats)
    d logprob / d l_j = [j = y] - p_j         d entropy / d l_j = -p_j (log p_j + entropy)

The four numbers of two disjoint sets of vocabulary rows combine into those of their union, the
log-sum-exp way: blocks of one rank and the shards of a tensor-parallel group are joined by the
same function, with one collective for the whole call.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megasd.types import PerToken, TokenIndex

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_BLOCK_ROWS = 8192  # [1024, 8192] float32 logits are 32 MiB: about what a large cache holds


class HeadOutput(NamedTuple):
    """Per token, float32 (float64 for float64 inputs), the same on every rank of the group."""

    logprobs: PerToken
    entropy: PerToken  # nats, of the full distribution


def vocabulary_head(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V_local H"],
    targets: TokenIndex,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> HeadOutput:
    """Log-probs of `targets` and entropy under softmax(hidden @ weight.T / temperature).

    `group` is the tensor-parallel group (None: this rank holds the whole vocabulary). `weight` is
    this rank's shard, ids rank * V_local and up; rows of ids >= vocab_size are padding and take no
    part (gradient 0). `hidden` and `targets` are the same on all ranks of the group.

    GRADIENT OF `hidden`: EACH RANK RETURNS ITS PARTIAL SUM, over its own vocabulary rows only. The
    true gradient is the sum over the group, left to the caller's region in front of the head
    (copy-to-tensor-parallel: all-reduce; gather-from-sequence-parallel: reduce-scatter). The
    gradient of `weight` is complete. Both come back in the dtype of their input and are
    accumulated in float32.

    Memory beyond inputs and gradients, in float32: two blocks of [chunk_tokens, 8192], and in
    backward one [8192, H] and one [N, H]. Differentiable once: create_graph=True raises.

    Raises ValueError for operands that do not fit together and for targets outside 0 ..
    vocab_size - 1 (one device synchronisation).
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    _check_operands(hidden, weight, temperature, chunk_tokens)
    shard_rows = weight.shape[0]
    if shard_rows * size < vocab_size:
        raise ValueError(
            f"{size} shards of {shard_rows} rows cannot hold a vocabulary of {vocab_size}; "
            "pass the output weight of this tensor-parallel rank, padded rows included"
        )
    outside = (targets < 0) | (targets >= vocab_size)
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"target {int(targets[position])} at position {position} is outside the vocabulary of "
            f"{vocab_size}; does the tokenizer belong to the model?"
        )
    first_id = rank * shard_rows
    valid_rows = min(max(vocab_size - first_id, 0), shard_rows)
    cut = Cut(first_id, valid_rows, temperature, chunk_tokens)
    return HeadOutput(*_VocabularyHead.apply(hidden, weight, targets, cut, group))


def _check_operands(hidden: Tensor, weight: Tensor, temperature: float, chunk_tokens: int) -> None:
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise ValueError(
            f"hidden is {hidden.dtype} and the head's weight {weight.dtype}; "
            "both must be bfloat16, both float32 or both float64"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if chunk_tokens < 1:
        raise ValueError(f"model.head_chunk_tokens is {chunk_tokens}; it must be at least 1")


class Cut(NamedTuple):
    """Which logits a rank computes, and how many at a time."""

    first_id: int  # vocabulary id of the first local row
    valid_rows: int  # local rows that are not padding; may be 0
    temperature: float
    chunk_tokens: int


class Tile(NamedTuple):
    """Consecutive vocabulary rows of this rank."""

    rows: slice  # of the local weight
    first_id: int  # vocabulary id of the first of them
    weight: Tensor  # [rows, H], ready to multiply

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where `ids` stand in the tile [same shape], and which of them really do (bool)."""
        places = ids - self.first_id
        size = self.weight.shape[0]
        return places.clamp(0, size - 1), (places >= 0) & (places < size)


class LogitBlocks:
    """This rank's logits, one [chunk of tokens, tile of rows] block at a time, in one buffer.

    What every pass over the vocabulary shares:

        for tile in blocks.tiles():
            for tokens in blocks.chunks:
                logits = blocks.logits(tile, tokens)  # valid until the next call; write into it

    Products of bfloat16 operands are taken in bfloat16 with float32 sums on CUDA; elsewhere the
    operands are cast, which is exact.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, cut: Cut) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)  # of logits and sums
        self.operand_dtype = hidden.dtype if hidden.is_cuda else self.dtype
        self.hidden = hidden.to(self.operand_dtype)
        self.chunks = list(_slices(hidden.shape[0], cut.chunk_tokens))
        self._weight = weight[: cut.valid_rows]
        self._cut = cut
        block_size = min(cut.chunk_tokens, hidden.shape[0]) * min(_BLOCK_ROWS, cut.valid_rows)
        self._buffers = hidden.new_empty(2, block_size, dtype=self.dtype)

    def tiles(self) -> Iterator[Tile]:
        for rows in _slices(self._weight.shape[0], _BLOCK_ROWS):
            weight = self._weight[rows].to(self.operand_dtype)
            yield Tile(rows, self._cut.first_id + rows.start, weight)

    def logits(self, tile: Tile, tokens: slice) -> Tensor:
        """hidden @ weight.T / temperature of these tokens and rows."""
        hidden = self.hidden[tokens]
        shape = (hidden.shape[0], tile.weight.shape[0])
        block = self._buffers[0, : shape[0] * shape[1]].view(shape)
        _add_product(block, hidden, tile.weight.T, alpha=1.0 / self._cut.temperature, beta=0.0)
        return block

    def scratch(self, logits: Tensor) -> Tensor:
        """Room for a second block of the same shape, for as long as `logits` is valid."""
        return self._buffers[1, : logits.numel()].view(logits.shape)


class _VocabularyHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, cut, group):
        statistics = _local_statistics(LogitBlocks(hidden, weight, cut), targets)
        if group is not None and statistics.numel():
            shards = statistics.new_empty(dist.get_world_size(group), *statistics.shape)
            dist.all_gather(list(shards.unbind()), statistics, group=group)
            statistics = _combine(shards)
        maximum, total, moment, target_logit = statistics
        ctx.save_for_backward(hidden, weight, targets, statistics)
        ctx.cut = cut
        ctx.set_materialize_grads(False)
        return target_logit - maximum - total.log(), total.log() - moment / total

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # only under create_graph=True
            raise RuntimeError("the vocabulary head has no second derivative; drop create_graph")
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        hidden, weight, targets, statistics = ctx.saved_tensors
        blocks = LogitBlocks(hidden, weight, ctx.cut)
        upstream = _Upstream.of(statistics, grad_logprobs, grad_entropy, ctx.cut.temperature)
        grad_hidden = torch.zeros_like(hidden, dtype=blocks.dtype) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        for tile in blocks.tiles():
            tile_sum = torch.zeros_like(tile.weight, dtype=blocks.dtype)
            for tokens in blocks.chunks:
                block = _logit_gradient(blocks, tile, tokens, targets[tokens], upstream)
                if grad_hidden is not None:
                    _add_product(grad_hidden[tokens], block, tile.weight)
                if grad_weight is not None:
                    _add_product(tile_sum, block.T, blocks.hidden[tokens])
            if grad_weight is not None:
                grad_weight[tile.rows] = tile_sum
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


def _local_statistics(blocks: LogitBlocks, targets: Tensor) -> Tensor:
    """[4, N] of this rank's rows: maximum, total, moment, target logit (0 where not here)."""
    statistics = torch.zeros((4, len(targets)), dtype=blocks.dtype, device=targets.device)
    statistics[0] = torch.finfo(blocks.dtype).min  # not -inf: its difference to itself must be 0
    for tile in blocks.tiles():
        part = torch.empty_like(statistics)
        for tokens in blocks.chunks:
            logits = blocks.logits(tile, tokens)
            places, here = tile.locate(targets[tokens])
            target_logit = logits.gather(1, places[:, None]).squeeze(1)
            maximum = logits.amax(dim=1)
            shifted = logits.sub_(maximum[:, None])
            weights = torch.exp(shifted, out=blocks.scratch(shifted))
            part[0, tokens] = maximum
            part[1, tokens] = weights.sum(dim=1)
            part[2, tokens] = weights.mul_(shifted).sum(dim=1)
            part[3, tokens] = target_logit.where(here, 0.0)
        statistics = _combine(torch.stack((statistics, part)))
    return statistics


def _combine(parts: Tensor) -> Tensor:
    """Joins the statistics [P, 4, N] of disjoint sets of vocabulary rows into those of all."""
    maxima, totals, moments, target_logits = parts.unbind(dim=1)
    maximum = maxima.amax(dim=0)
    shift = maxima - maximum
    scale = shift.exp()
    total = (totals * scale).sum(dim=0)
    moment = ((moments + totals * shift) * scale).sum(dim=0)
    return torch.stack((maximum, total, moment, target_logits.sum(dim=0)))


class _Upstream(NamedTuple):
    """Per token, what turns shifted logits z = l - maximum into the loss's gradient:

        d loss / d logit_j = exp(z_j) (offset + slope z_j) + at_target [j = target]

    With g and h the gradients of log-prob and entropy, and both over the temperature:
    offset = (h U / S - g) / S, slope = -h / S, at_target = g.
    """

    maximum: Tensor
    offset: Tensor
    slope: Tensor | None  # None: no gradient reaches the entropy
    at_target: Tensor

    @classmethod
    def of(
        cls,
        statistics: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        temperature: float,
    ) -> "_Upstream":
        maximum, total, moment, _ = statistics
        at_target = torch.zeros_like(total) if grad_logprobs is None else grad_logprobs
        at_target = at_target / temperature
        if grad_entropy is None:
            return cls(maximum, -at_target / total, None, at_target)
        slope = -grad_entropy / (temperature * total)
        return cls(maximum, -(at_target / total + slope * moment / total), slope, at_target)


def _logit_gradient(
    blocks: LogitBlocks, tile: Tile, tokens: slice, targets: Tensor, upstream: _Upstream
) -> Tensor:
    """The loss's gradient at one block of hidden @ weight.T, ready to multiply."""
    block = blocks.logits(tile, tokens).sub_(upstream.maximum[tokens, None])
    offset = upstream.offset[tokens, None]
    if upstream.slope is None:
        block.exp_().mul_(offset)
    else:
        weights = torch.exp(block, out=blocks.scratch(block))
        block.mul_(upstream.slope[tokens, None]).add_(offset).mul_(weights)
    places, here = tile.locate(targets)
    block.scatter_add_(1, places[:, None], upstream.at_target[tokens].where(here, 0.0)[:, None])
    return block.to(blocks.operand_dtype)


def _add_product(
    out: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """out <- beta out + alpha left @ right, summed in the dtype of `out`."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, alpha=alpha, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
