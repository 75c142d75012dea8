"""Divergences between two next-token distributions, S (the student) and T (the teacher).

KL(p, q) = sum p log(p / q) over vocabulary entries, in nats, 0 log 0 = 0:

    forward_kl = KL(T, S)    reverse_kl = KL(S, T)
    jsd = a KL(T, M) + (1 - a) KL(S, M),  M = a T + (1 - a) S    (arXiv:2306.13649, eq. 2)

Both sides come as log-probs that are normalised over the full vocabulary. The gradient flows
through S wherever it stands, M included, and never through T.
"""

import math
from typing import Any, Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from megasd.types import DivergenceKind, PerToken

Rest = Literal["tail", "renormalise"]

_Entries = Float[Tensor, "*entries"]
_Support = Float[Tensor, "N K"]


def divergence(
    student_logprobs: _Support,
    teacher_logprobs: _Support,
    *,
    kind: DivergenceKind,
    alpha: float = 0.5,
    rest: Rest,
    vocab_size: int,
    entry_clip: float | None = None,
) -> PerToken:
    """Divergence of each token over the K ids that both sides were read at.

    `rest` says what becomes of the ids left out: `tail` puts them in one more entry, of log-prob
    log(1 - sum p); `renormalise` leaves them out. K = `vocab_size` leaves none out, and `rest`
    changes nothing. Float32 log-probs are rounded by 1e-7, so a tail's logarithm is off by up to
    1e-7 / tail: no promise of digits where the student's support is compared by forward_kl, or the
    teacher's by reverse_kl, and that side's tail is below 1e-4. No preset does so.

    `alpha` and `entry_clip` are those of `divergence_entries`; the tail's entry is clipped too.
    """
    student = _complete(student_logprobs, rest, vocab_size)
    teacher = _complete(teacher_logprobs.detach(), rest, vocab_size)
    entries: Tensor = _Divergence.apply(student, teacher, kind, alpha, entry_clip)  # pyright: ignore[reportAssignmentType]
    return entries.sum(dim=1)


def cross_entropy(
    student_logprobs: _Support, teacher_logprobs: _Support, *, rest: Rest, vocab_size: int
) -> PerToken:
    """-sum_a T(a) log S(a) of each token, the H^x of DistIL, eq. 4; arguments as in `divergence`.

    It differs from forward_kl by the entropy of T: the gradients are the same.
    """
    student = _complete(student_logprobs, rest, vocab_size)
    teacher = _complete(teacher_logprobs.detach(), rest, vocab_size).exp()
    return -torch.where(teacher > 0, teacher * student, 0.0).sum(dim=1)


def divergence_entries(
    kind: DivergenceKind,
    student: _Entries,
    teacher: _Entries,
    *,
    alpha: float = 0.5,
    entry_clip: float | None = None,
) -> tuple[_Entries, _Entries]:
    """Each vocabulary entry's term and its derivative by the student's log-prob, T constant.

    `alpha`, strictly between 0 and 1, is the a of jsd. `entry_clip` is an upper bound on each
    term; the derivative is 0 where it holds. A term is infinite only where the divergence is: at
    an impossible entry (log-prob -inf) of the second argument that is possible in the first.
    """
    difference = teacher - student
    match kind:
        case "forward_kl":
            t = teacher.exp()
            entries = torch.where(t > 0, t * difference, 0.0)
            slopes = -t
        case "reverse_kl":
            s = student.exp()
            entries = torch.where(s > 0, -s * difference, 0.0)
            slopes = entries + s
        case "jsd":
            check_alpha(kind, alpha)
            s, t = student.exp(), teacher.exp()
            # log(M / S) and log(M / T) from the difference: no cancellation where S is near T.
            of_teacher, of_student = math.log(alpha), math.log1p(-alpha)
            over_student = _log_add(difference + of_teacher, of_student)
            over_teacher = _log_add(of_student - difference, of_teacher)
            slopes = torch.where(s > 0, (alpha - 1) * s * over_student, 0.0)
            entries = slopes - torch.where(t > 0, alpha * t * over_teacher, 0.0)
        case _:
            assert_never(kind)
    if entry_clip is not None:
        slopes = torch.where(entries > entry_clip, 0.0, slopes)
        entries = entries.clamp(max=entry_clip)
    return entries, slopes


def check_alpha(kind: DivergenceKind, alpha: float) -> None:
    """ValueError for a jsd whose alpha is not strictly between 0 and 1."""
    if kind == "jsd" and not 0 < alpha < 1:
        raise ValueError(
            f"alpha of jsd is {alpha}; it must lie strictly between 0 and 1 "
            "(its limits are other kinds: forward_kl for 0, reverse_kl for 1)"
        )


class _Divergence(torch.autograd.Function):
    """`divergence_entries` with its derivative as the gradient: finite where log-probs are not."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kind, alpha, entry_clip) -> Tensor:
        entries, slopes = divergence_entries(
            kind, student, teacher, alpha=alpha, entry_clip=entry_clip
        )
        ctx.save_for_backward(slopes)
        return entries

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (slopes,) = ctx.saved_tensors
        return upstream * slopes, None, None, None, None


def _complete(logprobs: Tensor, rest: Rest, vocab_size: int) -> Tensor:
    """Log-probs that sum to 1: with the tail as one more entry, or renormalised."""
    if logprobs.shape[1] >= vocab_size:
        return logprobs
    if rest == "renormalise":
        return logprobs - logprobs.logsumexp(dim=1, keepdim=True)
    # A small tail is the difference of two large numbers: what float32 rounds off is its size.
    mass = logprobs.double().logsumexp(dim=1, keepdim=True)
    tail = torch.log(-torch.expm1(mass.clamp(max=-1e-7)))
    return torch.cat((logprobs, tail.to(logprobs.dtype)), dim=1)


def _log_add(values: Tensor, constant: float) -> Tensor:
    """log(exp(values) + exp(constant))."""
    return torch.logaddexp(values, values.new_tensor(constant))
