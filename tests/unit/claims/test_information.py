"""What privileged context does to a divergence: on random tables, by brute force in float64."""

import math

import pytest
import torch
from torch import Tensor

from megasd.losses.divergence import divergence

SEEDS = range(50)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p, q) by its definition."""
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def random_table(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    """Positive probabilities; the last dimension sums to 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.softmax(-1)


def forward_kl(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """The package's, of one student [V] to each of the teacher's rows [R, V]."""
    student = student_logits.log_softmax(-1).expand_as(teacher)
    return divergence(
        student, teacher.log(), kind="forward_kl", rest="tail", vocab_size=teacher.shape[1]
    )


def test_a_teacher_with_context_costs_the_ideal_loss_plus_the_mutual_information():
    # RLSD theorem 1: the context r is drawn with the prompt and the student cannot see it.
    for seed in SEEDS:
        size, vocabulary = 2 + seed % 4, 3 + seed % 6
        contexts = random_table(size, seed=seed)
        teacher = random_table(size, vocabulary, seed=1000 + seed)  # T(y given r)
        marginal = contexts @ teacher  # the best teacher that does not look at r
        information = sum(contexts[r].item() * kl(teacher[r], marginal) for r in range(size))
        logits = random_table(vocabulary, seed=2000 + seed).log().requires_grad_()
        with_context = contexts @ forward_kl(logits, teacher)
        ideal = forward_kl(logits, marginal[None]).sum()
        assert with_context.item() == pytest.approx(ideal.item() + information, rel=1e-12)
        # so what the context leaks is a constant: both pull the student to the same place
        slopes = [torch.autograd.grad(loss, logits)[0] for loss in (with_context, ideal)]
        torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-14)
        expected = logits.softmax(0).detach() - marginal
        torch.testing.assert_close(slopes[0], expected, rtol=1e-10, atol=1e-14)


def influence(student: Tensor, success: Tensor) -> float:
    """How far one token moves the chance of success, relative to it, on average over S."""
    before = sum(s * v for s, v in zip(student.tolist(), success.tolist(), strict=True))
    return sum(
        s * abs(v / before - 1) for s, v in zip(student.tolist(), success.tolist(), strict=True)
    )


def bayes_teacher(student: Tensor, success: Tensor) -> Tensor:
    """The student who knows that it will succeed: S(a) P(success given a) / P(success)."""
    return student * success / (student * success).sum()


def reverse_kl(student: Tensor, teacher: Tensor) -> float:
    return divergence(
        student.log()[None],
        teacher.log()[None],
        kind="reverse_kl",
        rest="tail",
        vocab_size=len(student),
    ).item()


def test_a_token_s_influence_on_success_is_bounded_by_the_divergence_to_a_bayes_teacher():
    # RLRT theorem 2: Inf_S(t)^2 <= 2 KL(S, T)
    for seed in SEEDS:
        student = random_table(2 + seed % 8, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        success = torch.rand(len(student), generator=generator, dtype=torch.float64) ** 3
        teacher = bayes_teacher(student, success)
        moved = influence(student, success)
        assert moved == pytest.approx((student - teacher).abs().sum().item(), rel=1e-12)
        assert moved**2 <= 2 * reverse_kl(student, teacher)


def test_no_smaller_constant_than_two_would_do():
    student = torch.tensor([0.5, 0.5], dtype=torch.float64)
    success = torch.tensor([0.5, 0.51], dtype=torch.float64)
    bound = 2 * reverse_kl(student, bayes_teacher(student, success))
    assert 0.999 * bound < influence(student, success) ** 2 < bound
