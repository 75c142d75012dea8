import dataclasses

import pytest
import torch

from megasd.algorithms.grpo import GRPO
from megasd.algorithms.grpo_opsd import GRPOWithOPSD
from megasd.algorithms.opsd import OPSD
from tests.unit.cases import random_case, update_weights


def losses(algorithm, case):
    batch = case.batch(algorithm.needs)
    student = case.student(batch)
    credit = algorithm.assign_credit(batch, 0)
    return credit, algorithm.token_loss(student, batch, credit).loss, student


def test_without_coef_it_is_grpo_bit_for_bit_and_nothing_is_read():
    algorithm = GRPOWithOPSD(coef=0.0)
    assert algorithm.needs == GRPO().needs
    for seed in range(20):
        case = random_case(seed)
        credit, loss, _ = losses(algorithm, case)
        expected_credit, expected, _ = losses(GRPO(), case)
        assert torch.equal(loss, expected)
        assert torch.equal(credit.token_weights, expected_credit.token_weights)
        assert torch.equal(credit.path, expected_credit.path)


def total(algorithm, case):
    """The loss of the whole batch, one sum for each mini-batch with denominators of its own."""
    credit, loss, student = losses(algorithm, case)
    batch = case.batch(algorithm.needs)
    sums = []
    for minibatch in sorted(set(case.minibatch_ids)):
        inside = batch.minibatch_ids[batch.rollout_ids] == minibatch
        path = torch.where(inside, credit.path, -1)
        weights = update_weights("sequence_mean", batch, credit._replace(path=path))
        sums.append((loss.double() * weights).sum())
    return torch.stack(sums), student


def test_it_is_the_sum_of_two_means_each_over_its_own_tokens():
    for seed in range(20):
        case = random_case(seed)
        (mixed, student), (grpo, of_grpo), (opsd, of_opsd) = (
            total(algorithm, case)
            for algorithm in (GRPOWithOPSD(coef=0.3), GRPO(), OPSD(reduction="sequence_mean"))
        )
        torch.testing.assert_close(mixed, 0.7 * grpo + 0.3 * opsd, rtol=1e-5, atol=1e-6)
        for total_, other in ((mixed, student), (grpo, of_grpo), (opsd, of_opsd)):
            if total_.requires_grad:
                total_.sum().backward()
            assert other.logits is not None
        assert student.logits is not None
        assert of_opsd.logits is not None
        if opsd.any():
            torch.testing.assert_close(student.logits.grad, 0.3 * of_opsd.logits.grad)
        torch.testing.assert_close(
            student.logprobs.grad, 0.7 * of_grpo.logprobs.grad, rtol=1e-5, atol=1e-7
        )


def test_with_coef_1_it_is_opsd_bit_for_bit_denominators_and_all():
    algorithm = GRPOWithOPSD(coef=1.0)
    assert algorithm.needs == OPSD().needs, "not even a verifier is needed"
    for seed in range(20):
        case = random_case(seed)
        credit, loss, _ = losses(algorithm, case)
        opsd_credit, opsd, _ = losses(OPSD(), case)
        assert torch.equal(loss, opsd)
        assert torch.equal(credit.token_weights, opsd_credit.token_weights)
        assert torch.equal(credit.path, opsd_credit.path)


def test_a_batch_that_no_teacher_read_is_grpo_s_share():
    algorithm = GRPOWithOPSD(coef=0.5)
    for seed in range(5):
        case = random_case(seed)
        batch = dataclasses.replace(case.batch(algorithm.needs), teachers={}, teacher_hidden=None)
        credit = algorithm.assign_credit(batch, 0)
        loss = algorithm.token_loss(case.student(batch), batch, credit).loss
        torch.testing.assert_close(loss, 0.5 * losses(GRPO(), case)[1])


def test_an_unread_rollout_sends_no_gradient_through_the_distribution():
    case = random_case(1)
    assert not all(case.has_context)
    _, loss, student = losses(GRPOWithOPSD(), case)
    assert student.logits is not None
    (gradient,) = torch.autograd.grad(loss.sum(), student.logits)
    is_read = torch.tensor([case.has_context[rollout] for rollout in case.rollout_ids])
    assert not gradient[~is_read].any()
    assert gradient[is_read].any()


@pytest.mark.parametrize("coef", [-0.1, 1.1])
def test_an_impossible_coef_is_refused_by_name(coef):
    with pytest.raises(ValueError, match=rf"^algorithm\.coef .*{coef}"):
        GRPOWithOPSD(coef=coef)
