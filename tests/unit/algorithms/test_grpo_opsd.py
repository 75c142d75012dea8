import dataclasses

import pytest
import torch

from megasd.algorithms.grpo import GRPO
from megasd.algorithms.grpo_opsd import GRPOWithOPSD
from megasd.algorithms.opsd import OPSD
from tests.unit.cases import random_case


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


def test_loss_is_the_sum_of_both_with_divergence_0_where_no_context():
    for seed in range(20):
        case = random_case(seed)
        credit, loss, _ = losses(GRPOWithOPSD(coef=0.3), case)
        grpo_credit, grpo, _ = losses(GRPO(), case)
        _, opsd, _ = losses(OPSD(), case)
        is_read = torch.tensor([case.has_context[rollout] for rollout in case.rollout_ids])
        torch.testing.assert_close(loss, 0.7 * grpo + 0.3 * torch.where(is_read, opsd, 0.0))
        # one path over all response tokens; only those without any term are not run
        assert credit.path.tolist() == case.path
        used = torch.tensor(case.response_mask)
        expected = used & (is_read | (grpo_credit.advantages != 0))
        assert torch.equal(credit.token_weights, expected.float())


def test_with_coef_1_it_is_opsd_and_rollouts_without_context_are_not_run():
    for seed in range(20):
        case = random_case(seed)
        credit, loss, student = losses(GRPOWithOPSD(coef=1.0), case)
        opsd_credit, opsd, _ = losses(OPSD(), case)
        assert torch.equal(credit.token_weights, opsd_credit.token_weights)
        used = credit.token_weights > 0
        assert torch.equal(loss[used], opsd[used])
        (gradient,) = torch.autograd.grad(loss.sum(), student.logprobs)
        assert not gradient.any()


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
