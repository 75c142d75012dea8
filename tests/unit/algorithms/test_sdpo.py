import dataclasses
import math

import pytest
import torch

from megasd.algorithms.sdpo import SDPO
from megasd.losses.config import DivergenceConfig
from megasd.types import ResponseBatch, Support, TeacherScores
from tests.unit.cases import VOCABULARY, FakeStudent, random_case, update_weights


@pytest.fixture
def batch() -> ResponseBatch:
    """Two rollouts with context, one without; T(5) = 1/2 everywhere."""
    old_logprobs = torch.full((4,), -3.0)
    return ResponseBatch(
        rewards=torch.tensor([0.0, 1.0, 0.0]),
        is_correct=torch.tensor([False, True, False]),
        group_ids=torch.tensor([0, 0, 0]),
        minibatch_ids=torch.zeros(3, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 1, 2]),
        response_mask=torch.ones(4, dtype=torch.bool),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            "teacher": TeacherScores(
                has_context=torch.tensor([True, True, False]), logprobs=old_logprobs
            )
        },
        support=Support(
            ids=torch.full((4, 1), 5), teacher_logprobs=torch.full((4, 1), math.log(0.5))
        ),
    )


def test_loss_by_hand(batch):
    # reverse KL of the student's (1/12, 11/12) from (1/2, 1/2), times the ratio, at most 2
    algorithm = SDPO(divergence=DivergenceConfig(kind="reverse_kl", top_k=1))
    logprobs = (batch.old_logprobs + torch.tensor([0.5, 1.5, 3.0, 1.0]).log()).requires_grad_()
    logits = torch.zeros(4, VOCABULARY, requires_grad=True)
    student = FakeStudent(logprobs, logits=logits, batch=batch)
    credit = algorithm.assign_credit(batch, 0)
    loss, metrics = algorithm.token_loss(student, batch, credit)
    reverse_kl = math.log(1 / 6) / 12 + 11 / 12 * math.log(11 / 6)
    expected = [ratio * reverse_kl for ratio in (0.5, 1.5, 2.0, 1.0)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics["divergence"].tolist() == pytest.approx([reverse_kl] * 4, rel=1e-5)
    # the mean is over the three tokens of rollouts with context
    (loss * update_weights("token_mean", batch, credit)).sum().backward()
    assert logprobs.grad is None  # the ratio is a number
    assert logits.grad is not None
    # d/d logit_5: S (1 - S) [log(S / T) - log((1 - S) / (1 - T))]
    slope = 1 / 12 * 11 / 12 * (math.log(1 / 6) - math.log(11 / 6))
    expected = [slope * ratio / 3 for ratio in (0.5, 1.5, 2.0, 0.0)]
    assert logits.grad[:, 5].tolist() == pytest.approx(expected, rel=1e-5)


def test_rewards_change_nothing(batch):
    other = dataclasses.replace(batch, rewards=torch.rand(3), is_correct=~batch.is_correct)
    credits = (SDPO().assign_credit(one, 0) for one in (batch, other))
    assert all(torch.equal(a, b) for a, b in zip(*(credit[:3] for credit in credits), strict=True))


def test_the_paper_s_science_setting_is_the_default():
    assert SDPO().divergence == DivergenceConfig(kind="jsd", support="student", top_k=100)
    assert (SDPO().needs.support, SDPO().needs.support_size) == ("student", 100)
    assert SDPO.section_defaults["teacher"] == {"weights": "ema", "decay": 0.95}


def test_a_ratio_that_removes_everything_is_refused():
    with pytest.raises(ValueError, match=r"^algorithm\.max_importance_ratio .*0"):
        SDPO(max_importance_ratio=0.0)


@pytest.mark.parametrize("kind", ["jsd", "reverse_kl"])
def test_extreme_logits_and_ratios_leave_loss_and_gradient_finite(kind):
    algorithm = SDPO(divergence=DivergenceConfig(kind=kind))
    for seed in range(30):
        case = random_case(seed)
        case = dataclasses.replace(
            case,
            student_logits=[[300 * x for x in row] for row in case.student_logits],
            teacher_logits=[[300 * x for x in row] for row in case.teacher_logits],
            logprobs=[old + (-1) ** i * 500 for i, old in enumerate(case.old_logprobs)],
        )
        batch = case.batch(algorithm.needs)
        student = case.student(batch)
        loss = algorithm.token_loss(student, batch, algorithm.assign_credit(batch, 0)).loss
        assert student.logits is not None
        (gradient,) = torch.autograd.grad(loss.sum(), student.logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
