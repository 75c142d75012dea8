import math

import pytest
import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.grpo import GRPO
from megasd.algorithms.opd import OPD
from megasd.types import ResponseBatch, TeacherScores
from tests.unit import cases
from tests.unit.cases import FakeStudent

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two


@pytest.fixture
def batch() -> ResponseBatch:
    """One right and one wrong rollout of a group, then a lone one without context."""
    old_logprobs = torch.full((6,), -60.0)
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        is_correct=torch.tensor([True, False, True]),
        group_ids=torch.tensor([5, 5, 6]),
        minibatch_ids=torch.zeros(3, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 0, 1, 1, 2]),
        response_mask=torch.ones(6, dtype=torch.bool),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            "teacher": TeacherScores(
                has_context=torch.tensor([True, True, False]),
                logprobs=old_logprobs + torch.tensor([0.5, -2.0, 50.0, 0.25, 0.0, 0.0]),
            )
        },
    )


def test_credit_by_hand(batch):
    credit = OPD(coef=2.0).assign_credit(batch, 0)
    assert credit.advantages.tolist() == pytest.approx(
        [A + 1, A - 4, A + 100, -A + 0.5, -A, 0], rel=1e-5
    )
    assert credit.token_weights.tolist() == [1, 1, 1, 1, 1, 0]


def test_pure_distillation_needs_no_rewards(batch):
    algorithm = OPD(A_env=False)
    credit = algorithm.assign_credit(batch, 0)
    assert credit.advantages.tolist() == [0.5, -2, 50, 0.25, 0, 0]
    assert credit.path.tolist() == [0] * 6
    assert not algorithm.needs.rewards
    assert OPD().needs.rewards


def test_without_context_or_coefficient_it_is_grpo_bit_for_bit():
    for seed in range(20):
        case = cases.random_case(seed)
        expected = GRPO().assign_credit(case.batch(), 0)
        for actual in (
            OPD().assign_credit(case.batch(Needs()), 0),
            OPD(coef=0.0).assign_credit(case.batch(), 0),
        ):
            assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_in_expectation_over_sampled_tokens_it_descends_the_reverse_kl():
    generator = torch.manual_seed(0)
    logits = torch.randn(6, generator=generator).requires_grad_()
    student = logits.log_softmax(0)
    teacher = torch.randn(6, generator=generator).log_softmax(0)
    old = student.detach()
    batch = ResponseBatch(  # one rollout that holds each token of the vocabulary once
        rewards=torch.zeros(1),
        is_correct=torch.zeros(1, dtype=torch.bool),
        group_ids=torch.zeros(1, dtype=torch.long),
        minibatch_ids=torch.zeros(1, dtype=torch.long),
        rollout_ids=torch.zeros(6, dtype=torch.long),
        response_mask=torch.ones(6, dtype=torch.bool),
        max_response_tokens=6,
        old_logprobs=old,
        teachers={"teacher": TeacherScores(has_context=torch.tensor([True]), logprobs=teacher)},
    )
    algorithm = OPD(A_env=False, coef=0.7)
    credit = algorithm.assign_credit(batch, 0)
    loss = algorithm.token_loss(FakeStudent(student), batch, credit).loss
    (actual,) = torch.autograd.grad((old.exp() * loss).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(0.7 * (student.exp() * (student - teacher)).sum(), logits)
    assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def test_the_teacher_reads_nothing_that_counts_nothing(batch):
    assert OPD().rows_to_score(batch, {}, 0).all()
    assert not OPD(coef=0.0).rows_to_score(batch, {}, 0).any()


def test_a_setting_that_learns_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^algorithm\.coef is 0 and algorithm\.A_env is false"):
        OPD(coef=0.0, A_env=False)
    with pytest.raises(ValueError, match=r"^algorithm\.coef must be 0 or more, not -1"):
        OPD(coef=-1.0)
