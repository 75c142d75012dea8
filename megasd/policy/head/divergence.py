"""Divergence of two next-token distributions over the whole vocabulary, without their logits.

Student and teacher come as final hidden states and head weights. Pass 1 reads the normalisers of
both; pass 2 computes the logits of both again, block by block, and sums the entries' terms f_j and
their derivatives g_j by the student's log-prob s_j. With S_j = exp(s_j) and G = sum_j g_j:

    d divergence / d logit_j = (g_j - S_j G) / temperature

which the backward pass, a third one, multiplies out. Between the passes a token keeps five numbers.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megasd.losses.divergence import DivergenceKind, check_alpha, divergence_entries
from megasd.policy.head.blocks import (
    Cut,
    LogitBlocks,
    Tile,
    combine,
    gather,
    input_gradients,
    local_statistics,
    main_grad_of,
    refuse_second_derivative,
)
from megasd.types import PerToken


def full_divergence(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V_local H"],
    teacher_hidden: Float[Tensor, "N H_teacher"],
    teacher_weight: Float[Tensor, "V_local H_teacher"],
    *,
    kind: DivergenceKind,
    alpha: float = 0.5,
    entry_clip: float | None = None,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> PerToken:
    """Divergence of each token over all ids, as `losses.divergence` defines it, in nats.

    Both sides are softmax(hidden @ weight.T / temperature) and hold the same ids on a rank;
    `group`, padding, dtypes AND THE PARTIAL GRADIENT OF `hidden` as in `vocabulary_head`. No
    gradient goes to the teacher. The result is the same on every rank of the group.

    Memory beyond inputs and gradients, in float32: ten blocks of [chunk_tokens, 8192] (jsd: 14; on
    a GPU two, in backward another in the dtype of the inputs), in backward also [8192, H] and
    [N, H]; `main_grad` as in `vocabulary_head`. Differentiable once: create_graph=True raises.

    Raises ValueError for operands that do not fit together and for an alpha that jsd cannot take.
    """
    if len(hidden) != len(teacher_hidden) or len(weight) != len(teacher_weight):
        raise ValueError(
            f"the student has {len(hidden)} tokens and {len(weight)} vocabulary rows, the teacher "
            f"{len(teacher_hidden)} and {len(teacher_weight)}; pass the same tokens, and weights "
            "padded and sharded alike"
        )
    check_alpha(kind, alpha)
    cut, _ = (  # the same for both: their rows are as many
        Cut.of(
            states,
            rows,
            vocab_size=vocab_size,
            group=group,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        for states, rows in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    measure = _Measure(kind, alpha, entry_clip)
    return _FullDivergence.apply(  # pyright: ignore[reportReturnType]
        hidden, weight, teacher_hidden, teacher_weight, measure, cut, group
    )


class _Measure(NamedTuple):
    kind: DivergenceKind
    alpha: float
    entry_clip: float | None

    def entries(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return divergence_entries(
            self.kind, student, teacher, alpha=self.alpha, entry_clip=self.entry_clip
        )


class _LogprobBlocks(NamedTuple):
    """Log-probs of one side, block by block."""

    logits: LogitBlocks
    normalisers: Tensor  # [2, N]: maximum and log of the total

    @classmethod
    def read(cls, logits: LogitBlocks, group: dist.ProcessGroup | None) -> "_LogprobBlocks":
        maximum, total, _ = combine(gather(local_statistics(logits), group))
        return cls(logits, torch.stack((maximum, total.log())))

    def at(self, tile: Tile, tokens: slice) -> Tensor:
        maximum, log_total = self.normalisers[:, tokens, None]
        return self.logits.logits(tile, tokens).sub_(maximum).sub_(log_total)


class _Pair(NamedTuple):
    """Both sides and what is measured between them."""

    student: _LogprobBlocks
    teacher: _LogprobBlocks
    measure: _Measure

    def sums(self) -> Tensor:
        """[2, N]: entries and slopes, summed over this rank's rows."""
        sums = torch.zeros_like(self.student.normalisers)
        for tile in self.student.logits.tiles():
            tiles = tile, self.teacher.logits.tile(tile.rows)
            for tokens in self.student.logits.chunks:
                if kernels := self.student.logits.kernels:
                    block = self._block(tiles, tokens)
                    kernels.add_divergence(*block, sums[:, tokens], **self.measure._asdict())
                    continue
                terms = self.measure.entries(*self._logprobs(tiles, tokens))
                for total, values in zip(sums, terms, strict=True):
                    total[tokens] += values.sum(dim=1)
        return sums

    def gradient(self, tile: Tile, tokens: slice, slopes_sum: Tensor, upstream: Tensor) -> Tensor:
        """The gradient at one block of the student's hidden @ weight.T, ready to multiply."""
        logits = self.student.logits
        tiles = tile, self.teacher.logits.tile(tile.rows)
        if logits.kernels is not None:
            block = self._block(tiles, tokens)
            gradient = logits.gradient(block[0])
            logits.kernels.divergence_gradient(
                *block,
                slopes_sum[tokens],
                upstream[tokens],
                gradient,
                **self.measure._asdict(),
            )
            return gradient
        logprobs, teacher_logprobs = self._logprobs(tiles, tokens)
        _, slopes = self.measure.entries(logprobs, teacher_logprobs)
        block = slopes.sub_(logprobs.exp_().mul_(slopes_sum[tokens, None]))
        return block.mul_(upstream[tokens, None]).to(logits.operand_dtype)

    def _logprobs(self, tiles: tuple[Tile, Tile], tokens: slice) -> tuple[Tensor, Tensor]:
        return self.student.at(tiles[0], tokens), self.teacher.at(tiles[1], tokens)

    def _block(self, tiles: tuple[Tile, Tile], tokens: slice) -> tuple[Tensor, ...]:
        """Logits of both sides, normalisers of both sides."""
        sides = self.student, self.teacher
        logits = [side.logits.logits(tile, tokens) for side, tile in zip(sides, tiles, strict=True)]
        return *logits, *(side.normalisers[:, tokens] for side in sides)


class _FullDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, measure, cut, group):
        student = _LogprobBlocks.read(LogitBlocks(hidden, weight, cut), group)
        teacher = _LogprobBlocks.read(LogitBlocks(teacher_hidden, teacher_weight, cut), group)
        sums = _Pair(student, teacher, measure).sums()
        values, slopes = gather(sums, group).sum(dim=0)
        ctx.save_for_backward(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            student.normalisers,
            teacher.normalisers,
            slopes.clone(),
        )
        ctx.measure, ctx.cut, ctx.main_grad = measure, cut, main_grad_of(weight)
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        hidden, weight, teacher_hidden, teacher_weight, *statistics = ctx.saved_tensors
        normalisers, teacher_normalisers, slopes_sum = statistics
        blocks = LogitBlocks(hidden, weight, ctx.cut)
        teacher = LogitBlocks(teacher_hidden, teacher_weight, ctx.cut)
        pair = _Pair(
            _LogprobBlocks(blocks, normalisers),
            _LogprobBlocks(teacher, teacher_normalisers),
            ctx.measure,
        )
        upstream = upstream / ctx.cut.temperature
        gradients = input_gradients(
            blocks,
            hidden,
            weight,
            ctx.needs_input_grad[:2],
            lambda tile, tokens: pair.gradient(tile, tokens, slopes_sum, upstream),
            ctx.main_grad,
        )
        return *gradients, None, None, None, None, None
