import dataclasses
import math

import pytest
import torch

from megasd.algorithms.opsd import OPSD
from megasd.losses.config import DivergenceConfig
from megasd.types import ResponseBatch, Support, TeacherHidden, TeacherScores
from tests.unit.cases import VOCABULARY, FakeStudent, random_case

# The teacher gives half its mass to id 3 and shares the rest; the student gives all ids the same.
T, S = (1 / 2, 1 / 2), (1 / VOCABULARY, 1 - 1 / VOCABULARY)
M = tuple((t + s) / 2 for t, s in zip(T, S, strict=True))


def kl_divergence(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.fixture
def batch() -> ResponseBatch:
    """A rollout with context and a masked token, then one without context."""
    old_logprobs = torch.full((4,), -2.0)
    teacher = torch.full((4, VOCABULARY), 0.5 / 11)
    teacher[:, 3] = 0.5
    return ResponseBatch(
        rewards=torch.zeros(2),
        is_correct=torch.zeros(2, dtype=torch.bool),
        group_ids=torch.tensor([0, 1]),
        minibatch_ids=torch.zeros(2, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 0, 1]),
        response_mask=torch.tensor([True, False, True, True]),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            "teacher": TeacherScores(has_context=torch.tensor([True, False]), logprobs=old_logprobs)
        },
        support=Support(
            ids=torch.full((4, 1), 3), teacher_logprobs=torch.full((4, 1), math.log(0.5))
        ),
        teacher_hidden=TeacherHidden(hidden=teacher.log(), weight=torch.eye(VOCABULARY)),
    )


def student_of(batch: ResponseBatch) -> FakeStudent:
    logits = torch.zeros(4, VOCABULARY, requires_grad=True)
    return FakeStudent(torch.full((4,), -2.0), logits=logits, batch=batch)


def test_only_rollouts_with_context_are_in_the_update_and_its_denominator(batch):
    credit = OPSD().assign_credit(batch, 0)
    assert credit.token_weights.tolist() == [1, 0, 1, 0]
    assert credit.path.tolist() == [0, -1, 0, -1]
    unread = dataclasses.replace(batch, teachers={})
    assert OPSD().assign_credit(unread, 0).path.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("jsd", (kl_divergence(T, M) + kl_divergence(S, M)) / 2),
        ("forward_kl", kl_divergence(T, S)),
        ("reverse_kl", kl_divergence(S, T)),
    ],
)
@pytest.mark.parametrize("support", ["full", "teacher"])
def test_loss_by_hand(batch, kind, support, expected):
    # beyond id 3 both are uniform, so one bucket for the rest loses nothing
    algorithm = OPSD(divergence=DivergenceConfig(kind=kind, support=support, top_k=1))
    credit = algorithm.assign_credit(batch, 0)
    loss, metrics = algorithm.token_loss(student_of(batch), batch, credit)
    assert loss.tolist() == pytest.approx([expected] * 4, rel=1e-5)
    assert metrics["divergence"].tolist() == loss.tolist()


def test_the_paper_s_divergence_is_jsd_over_the_whole_vocabulary(batch):
    assert OPSD().divergence == DivergenceConfig(kind="jsd", alpha=0.5, support="full")
    assert OPSD().needs.teacher_hidden
    assert OPSD().needs.support is None
    assert not OPSD().needs.rewards


def test_a_clipped_entry_costs_at_most_the_clip(batch):
    # forward KL: id 3 costs log(6) / 2, the eleven others save a little each
    config = DivergenceConfig(kind="forward_kl", support="full", entry_clip=0.05)
    loss = OPSD(divergence=config).divergences(student_of(batch), batch)
    assert loss.tolist() == pytest.approx([0.05 + 0.5 * math.log(6 / 11)] * 4, rel=1e-5)


def test_the_ablations_by_hand(batch):
    student = student_of(batch)
    of_teacher, of_student = OPSD(ablation="teacher_top1"), OPSD(ablation="student_top1")
    loss = of_teacher.divergences(student, batch)
    assert loss.tolist() == pytest.approx([math.log(12)] * 4, rel=1e-6)
    loss = of_student.divergences(student, batch)
    assert loss.tolist() == pytest.approx([0.5 * math.log(6)] * 4, rel=1e-6)
    # d/d logit_j of -T log S(3) is -T ([j = 3] - S(j))
    loss.sum().backward()
    assert student.logits is not None
    assert student.logits.grad is not None
    expected = [-0.5 * ((j == 3) - 1 / 12) for j in range(VOCABULARY)]
    assert student.logits.grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert (of_teacher.needs.support, of_teacher.needs.support_size) == ("teacher", 1)
    assert (of_student.needs.support, of_student.needs.support_size) == ("student", 1)
    assert not of_teacher.needs.teacher_hidden


@pytest.mark.parametrize("ablation", [None, "teacher_top1", "student_top1"])
def test_extreme_logits_leave_loss_and_gradient_finite(ablation):
    for seed in range(20):
        algorithm = OPSD(ablation=ablation)
        case = random_case(seed)
        case = dataclasses.replace(
            case,
            student_logits=[[1000 * x for x in row] for row in case.student_logits],
            teacher_logits=[[1000 * x for x in row] for row in case.teacher_logits],
        )
        batch = case.batch(algorithm.needs)
        student = case.student(batch)
        loss = algorithm.token_loss(student, batch, algorithm.assign_credit(batch, 0)).loss
        loss.sum().backward()
        assert student.logits is not None
        assert student.logits.grad is not None
        assert loss.isfinite().all()
        assert student.logits.grad.isfinite().all()
