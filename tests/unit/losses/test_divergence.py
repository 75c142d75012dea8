"""Divergences on K ids and on single entries against float64 brute force and hand values."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from megasd.losses.divergence import (
    DivergenceKind,
    Rest,
    cross_entropy,
    divergence,
    divergence_entries,
)

KINDS = get_args(DivergenceKind)
TOKENS, VOCAB, K = 12, 30, 6


def brute_force(
    kind: DivergenceKind, student: Tensor, teacher: Tensor, alpha: float = 0.5
) -> Tensor:
    """Terms of probabilities, by the definitions, with autograd's own gradient."""
    s, t = student.exp(), teacher.exp()
    m = alpha * t + (1 - alpha) * s
    return {
        "forward_kl": t * (t / s).log(),
        "reverse_kl": s * (s / t).log(),
        "jsd": alpha * t * (t / m).log() + (1 - alpha) * s * (s / m).log(),
    }[kind]


def two_sides(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Log-probs over the whole vocabulary; the student's logits ask for a gradient."""
    random = torch.Generator().manual_seed(11)
    logits = 2 * torch.randn(2, TOKENS, VOCAB, generator=random, dtype=dtype)
    return logits[0].log_softmax(-1).requires_grad_(), logits[1].log_softmax(-1)


def at_top(student: Tensor, teacher: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    ids = teacher.topk(k, dim=1).indices
    return student.gather(1, ids), teacher.gather(1, ids)


def completed(logprobs: Tensor, rest: Rest) -> Tensor:
    """The support's distribution from probabilities: K + 1 entries with the tail, or K."""
    p = logprobs.exp()
    left = 1 - p.sum(dim=1, keepdim=True)
    return (torch.cat((p, left), 1) if rest == "tail" else p / (1 - left)).log()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry_clip", [None, 0.02])
def test_entries_and_derivatives_are_those_of_the_definitions(
    kind: DivergenceKind, alpha: float, entry_clip: float | None
) -> None:
    student, teacher = two_sides()
    expected = brute_force(kind, student, teacher, alpha)
    if entry_clip is not None:
        assert (expected > entry_clip).any()
        expected = expected.clamp(max=entry_clip)
    (slopes,) = torch.autograd.grad(expected.sum(), student)
    actual = divergence_entries(kind, student, teacher, alpha=alpha, entry_clip=entry_clip)
    torch.testing.assert_close(actual, (expected, slopes), rtol=1e-10, atol=1e-12)


def test_divergences_of_two_coins_by_hand() -> None:
    # S = (1/2, 1/2), T = (1/4, 3/4), M = (3/8, 5/8)
    student, teacher = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log().double()[:, None]
    log = math.log
    forward = 0.25 * log(1 / 2) + 0.75 * log(3 / 2)
    reverse = 0.5 * log(2) + 0.5 * log(2 / 3)
    jsd = 0.5 * (0.25 * log(2 / 3) + 0.75 * log(6 / 5)) + 0.5 * (0.5 * log(4 / 3 * 4 / 5))
    for kind, value in zip(KINDS, (forward, reverse, jsd), strict=True):
        actual = divergence(student, teacher, kind=kind, rest="tail", vocab_size=2)
        assert actual.item() == pytest.approx(value, abs=1e-7)
    # One id of the two and its tail are the whole coin.
    one = student[:, :1], teacher[:, :1]
    actual = divergence(*one, kind="forward_kl", rest="tail", vocab_size=2)
    assert actual.item() == pytest.approx(forward, abs=1e-7)
    assert divergence(*one, kind="forward_kl", rest="renormalise", vocab_size=2).item() == 0
    crossed = cross_entropy(*one, rest="tail", vocab_size=2)
    assert crossed.item() == pytest.approx(log(2), abs=1e-7)


@pytest.mark.parametrize("rest", get_args(Rest))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_values_and_gradients_on_a_support_are_those_of_its_own_distribution(
    kind: DivergenceKind, rest: Rest, entry_clip: float | None
) -> None:
    student, teacher = two_sides()
    support = at_top(student, teacher)
    entries = brute_force(kind, *(completed(side, rest) for side in support), alpha=0.3)
    expected = entries.clamp(max=entry_clip).sum(dim=1) if entry_clip else entries.sum(dim=1)
    actual = divergence(
        *support, kind=kind, alpha=0.3, rest=rest, vocab_size=VOCAB, entry_clip=entry_clip
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(actual, student, weights, retain_graph=True),
        torch.autograd.grad(expected, student, weights),
        rtol=1e-8,
        atol=1e-12,
    )


@pytest.mark.parametrize("rest", get_args(Rest))
def test_cross_entropy_is_forward_kl_plus_the_teachers_entropy_with_the_same_gradient(
    rest: Rest,
) -> None:
    student, teacher = two_sides()
    support = at_top(student, teacher)
    t = completed(support[1], rest)
    crossed = cross_entropy(*support, rest=rest, vocab_size=VOCAB)
    forward = divergence(*support, kind="forward_kl", rest=rest, vocab_size=VOCAB)
    torch.testing.assert_close(crossed, forward - (t.exp() * t).sum(dim=1))
    torch.testing.assert_close(crossed, -(t.exp() * completed(support[0], rest)).sum(dim=1))
    (of_crossed,) = torch.autograd.grad(crossed.sum(), student, retain_graph=True)
    (of_forward,) = torch.autograd.grad(forward.sum(), student)
    assert of_forward.any()
    assert torch.equal(of_crossed, of_forward)


@pytest.mark.parametrize("rest", get_args(Rest))
@pytest.mark.parametrize("kind", KINDS)
def test_a_support_of_the_whole_vocabulary_is_the_dense_divergence(
    kind: DivergenceKind, rest: Rest
) -> None:
    student, teacher = two_sides()
    actual = divergence(student, teacher, kind=kind, rest=rest, vocab_size=VOCAB)
    torch.testing.assert_close(actual, brute_force(kind, student, teacher).sum(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_coarser_support_with_its_tail_never_tells_more_than_a_finer_one(
    kind: DivergenceKind,
) -> None:
    student, teacher = two_sides()
    with torch.no_grad():
        values = torch.stack(
            [
                divergence(*at_top(student, teacher, k), kind=kind, rest="tail", vocab_size=VOCAB)
                for k in (1, 2, 5, 10, 20, VOCAB)
            ]
        )
    assert (values[:-1] <= values[1:] + 1e-12).all()
    assert (values[0] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_sides_diverge_by_nothing_and_pull_nowhere(kind: DivergenceKind) -> None:
    _, teacher = two_sides(torch.float32)
    student = teacher.clone().requires_grad_()
    support = at_top(student, teacher)
    value = divergence(*support, kind=kind, rest="tail", vocab_size=VOCAB)
    # The derivative by log-probs is -T or S: 0 once it is pulled through the softmax.
    logits = teacher.clone().requires_grad_()
    support = at_top(logits.log_softmax(dim=1), teacher)
    divergence(*support, kind=kind, rest="tail", vocab_size=VOCAB).sum().backward()
    assert value.abs().max() < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_of_a_float32_support_that_holds_almost_everything_is_finite(
    kind: DivergenceKind,
) -> None:
    student = torch.tensor([[0.0, -20.0], [-1e-9, -18.0], [-0.5, -0.9]], requires_grad=True)
    teacher = torch.tensor([[-1e-9, -18.0], [0.0, -20.0], [0.0, -30.0]])
    value = divergence(student, teacher, kind=kind, rest="tail", vocab_size=9)
    value.sum().backward()
    assert value.isfinite().all()
    assert value[:2].abs().max() < 1e-5
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_small_float32_tail_is_as_good_as_the_rounding_of_its_log_probs(
    kind: DivergenceKind,
) -> None:
    """The support is that of the side whose tail is small, which divides."""
    random = torch.Generator().manual_seed(3)
    count, top, share = 4000, 8, torch.rand(2, 4000, 1, generator=random, dtype=torch.float64)
    small, large = 10 ** (-3 - 4 * share[0]), 10 ** (-1 - 2 * share[1])
    logits = torch.randn(2, count, top, generator=random, dtype=torch.float64)
    of_small, of_large = (
        part.log_softmax(-1) + torch.log1p(-tail)
        for part, tail in zip(logits, (small, large), strict=True)
    )
    sides = (of_small, of_large) if kind == "forward_kl" else (of_large, of_small)
    exact, found = (
        divergence(*(s.to(dtype) for s in sides), kind=kind, rest="tail", vocab_size=64)
        for dtype in (torch.float64, torch.float32)
    )
    bound = large * 1.2e-7 / small + 2e-6  # half a unit in the last place of the log-probs
    assert ((found - exact).abs() <= bound.squeeze(1)).all()


def _extreme(kind: DivergenceKind, s: float, t: float) -> tuple[float, float]:
    entries, slopes = divergence_entries(kind, torch.tensor([s]), torch.tensor([t]), alpha=0.25)
    return entries.item(), slopes.item()


NEVER = -math.inf


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "entry", "slope"),
    [
        *[(kind, s, t, 0, 0) for kind in KINDS for s in (NEVER, -1e4) for t in (NEVER, -1e4)],
        ("forward_kl", 0.0, NEVER, 0, 0),
        ("forward_kl", 0.0, -1e4, 0, 0),
        ("forward_kl", -1e4, 0.0, 1e4, -1),
        ("forward_kl", NEVER, 0.0, math.inf, -1),
        ("reverse_kl", NEVER, 0.0, 0, 0),
        ("reverse_kl", -1e4, 0.0, 0, 0),
        ("reverse_kl", 0.0, -1e4, 1e4, 1e4 + 1),
        ("reverse_kl", 0.0, NEVER, math.inf, math.inf),
        # M = 1/4 T + 3/4 S
        *[("jsd", 0.0, t, 0.75 * math.log(4 / 3), 0.75 * math.log(4 / 3)) for t in (NEVER, -1e4)],
        *[("jsd", s, 0.0, 0.25 * math.log(4), 0) for s in (NEVER, -1e4)],
    ],
)
def test_impossible_and_nearly_impossible_entries_by_hand(
    kind: DivergenceKind, student: float, teacher: float, entry: float, slope: float
) -> None:
    assert _extreme(kind, student, teacher) == pytest.approx((entry, slope))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_beside_impossible_entries_are_finite(kind: DivergenceKind) -> None:
    logits = torch.tensor([[0.0, 1.0, NEVER, -1e4]], dtype=torch.float64)
    student = logits.log_softmax(dim=1).requires_grad_()
    teacher = torch.tensor([[0.5, 0.0, NEVER, -1e4]], dtype=torch.float64).log_softmax(dim=1)
    value = divergence(student, teacher, kind=kind, rest="renormalise", vocab_size=4)
    value.sum().backward()
    expected = brute_force(kind, student[:, :2], teacher[:, :2]).sum()
    torch.testing.assert_close(value.sum(), expected)
    assert student.grad is not None
    assert student.grad[0, 2:].tolist() == [0, 0]
    assert student.grad[0, :2].isfinite().all()
    crossed = cross_entropy(student, teacher, rest="tail", vocab_size=4)
    assert crossed.isfinite().all()
    assert torch.autograd.grad(crossed.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_clip_makes_an_infinite_entry_finite_and_silent(kind: DivergenceKind) -> None:
    impossible, likely = torch.tensor([[NEVER, 0.0]]), torch.tensor([[-0.5, -0.9328]])
    student, teacher = (impossible, likely) if kind == "forward_kl" else (likely, impossible)
    student = student.clone().requires_grad_()
    value = divergence(student, teacher, kind=kind, rest="tail", vocab_size=2, entry_clip=0.05)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad[0, 0] == 0
    assert student.grad.isfinite().all()


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = two_sides()
    teacher.requires_grad_()
    for rest in get_args(Rest):
        support = at_top(student, teacher)
        total = cross_entropy(*support, rest=rest, vocab_size=VOCAB).sum()
        for kind in KINDS:
            total = total + divergence(*support, kind=kind, rest=rest, vocab_size=VOCAB).sum()
        total.backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_limits_of_jsd_are_refused_with_the_kinds_to_use(alpha: float) -> None:
    student, teacher = two_sides()
    with pytest.raises(ValueError, match=r"alpha of jsd is .* forward_kl for 0, reverse_kl for 1"):
        divergence(student, teacher, kind="jsd", alpha=alpha, rest="tail", vocab_size=VOCAB)


def test_a_batch_without_tokens_gives_an_empty_result() -> None:
    none = torch.empty(0, K)
    assert divergence(none, none, kind="jsd", rest="tail", vocab_size=VOCAB).shape == (0,)
    assert cross_entropy(none, none, rest="tail", vocab_size=VOCAB).shape == (0,)
