import dataclasses
import math

import pytest
import torch

from megasd.algorithms.grpo import GRPO
from megasd.algorithms.sdpo import SDPO
from megasd.algorithms.srpo import SRPO
from megasd.types import ResponseBatch, TeacherScores
from tests.unit.cases import FakeStudent, random_case


def routed_tokens(batch: ResponseBatch) -> torch.Tensor:
    routed = ~batch.is_correct & batch.has_context()
    return routed[batch.rollout_ids] & batch.response_mask


def with_teacher(
    batch: ResponseBatch, has_context: torch.Tensor, entropy: torch.Tensor
) -> ResponseBatch:
    assert batch.old_logprobs is not None
    scores = TeacherScores(has_context=has_context, logprobs=batch.old_logprobs, entropy=entropy)
    return dataclasses.replace(batch, teachers={"teacher": scores})


def test_weights_and_advantages_by_hand():
    """Rollouts: correct, two incorrect with context, incorrect without; a second mini-batch."""
    batch = ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        is_correct=torch.tensor([True, False, False, False, False, False]),
        group_ids=torch.tensor([0, 0, 0, 0, 1, 1]),
        minibatch_ids=torch.tensor([0, 0, 0, 0, 1, 1]),
        rollout_ids=torch.tensor([0, 1, 1, 2, 3, 4, 5]),
        response_mask=torch.tensor([True, True, False, True, True, True, True]),
        max_response_tokens=4,
        old_logprobs=torch.full((7,), -1.0),
    )
    has_context = torch.tensor([False, True, True, False, True, False])
    entropy = torch.tensor([0.0, math.log(3.0), 0.0, 0.0, 9.0, 2.0, 2.0])
    credit = SRPO(beta=1.0).assign_credit(with_teacher(batch, has_context, entropy), 0)
    # exp(-H) is 1/3 and 1 in the first mini-batch, mean 2/3; alone in the second
    assert credit.token_weights.tolist() == pytest.approx([1, 0.5, 0, 1.5, 1, 1, 0])
    # rewards 1 0 0 0, not divided by their std; routed rollouts have a divergence instead
    assert credit.advantages.tolist() == pytest.approx([0.75, 0, 0, 0, -0.25, 0, 0])
    assert credit.path.tolist() == [0, 0, -1, 0, 0, 0, 0]
    assert credit.metrics["routed"] == pytest.approx(3 / 6)
    assert credit.metrics["routed_weight_max"] == pytest.approx(1.5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_routed_tokens_are_sdpo_s_times_a_weight_and_the_others_grpo_s(beta):
    algorithm = SRPO(beta=beta)
    num_routed = 0
    for seed in range(40):
        case = random_case(seed)
        batch = case.batch(algorithm.needs)
        credit = algorithm.assign_credit(batch, 0)
        student = case.student(batch)
        loss = algorithm.token_loss(student, batch, credit).loss
        routed = routed_tokens(batch)
        num_routed += int(routed.sum())
        sdpo = SDPO().token_loss(student, batch, SDPO().assign_credit(batch, 0)).loss
        grpo = GRPO(scale_by_std=False)
        grpo_credit = grpo.assign_credit(batch, 0)
        surrogate = grpo.token_loss(student, batch, grpo_credit).loss
        others = batch.response_mask & ~routed
        assert torch.equal(loss[routed], sdpo[routed])
        assert torch.equal(loss[others], surrogate[others])
        assert torch.equal(credit.token_weights[others], grpo_credit.token_weights[others])
        assert credit.path.tolist() == case.path

        for token in routed.nonzero().flatten().tolist():
            minibatch = case.minibatch_ids[case.rollout_ids[token]]
            peers = [
                math.exp(-beta * case.roles["teacher"].entropy[other])
                for other in routed.nonzero().flatten().tolist()
                if case.minibatch_ids[case.rollout_ids[other]] == minibatch
            ]
            weight = math.exp(-beta * case.roles["teacher"].entropy[token])
            expected = weight / (sum(peers) / len(peers))
            assert credit.token_weights[token].item() == pytest.approx(expected, rel=1e-5)
    assert num_routed > 100


def test_an_unsure_teacher_does_not_divide_0_by_0():
    algorithm = SRPO(beta=1e6)
    for seed in range(20):
        batch = random_case(seed).batch(algorithm.needs)
        entropy = batch.teachers["teacher"].entropy
        assert entropy is not None
        batch = with_teacher(batch, batch.has_context(), entropy + 1e6)
        credit = algorithm.assign_credit(batch, 0)
        routed = routed_tokens(batch)
        assert credit.token_weights.isfinite().all()
        for minibatch in (0, 1):
            peers = routed & (batch.minibatch_ids[batch.rollout_ids] == minibatch)
            if peers.any():  # the weights' mean is 1 all the same
                assert credit.token_weights[peers].mean().item() == pytest.approx(1.0)


def test_extreme_logits_leave_loss_and_gradients_finite():
    algorithm = SRPO()
    for seed in range(20):
        case = random_case(seed)
        case = dataclasses.replace(
            case,
            student_logits=[[300 * x for x in row] for row in case.student_logits],
            teacher_logits=[[300 * x for x in row] for row in case.teacher_logits],
        )
        batch = case.batch(algorithm.needs)
        assert batch.support is not None
        # what the loop puts where nothing was read: one id, K times
        unread = ~batch.has_context()[batch.rollout_ids]
        batch.support.ids[unread] = 0
        student = case.student(batch)
        loss = algorithm.token_loss(student, batch, algorithm.assign_credit(batch, 0)).loss
        assert student.logits is not None
        gradients = torch.autograd.grad(
            loss.sum(), (student.logits, student.logprobs), allow_unused=True
        )
        assert loss.isfinite().all()
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_where_nothing_was_read_it_is_grpo_bit_for_bit():
    algorithm, grpo = SRPO(), GRPO(scale_by_std=False)
    for seed in range(10):
        case = random_case(seed)
        batch = dataclasses.replace(case.batch(algorithm.needs), teachers={}, support=None)
        credit, expected = algorithm.assign_credit(batch, 0), grpo.assign_credit(batch, 0)
        assert all(torch.equal(a, b) for a, b in zip(credit[:3], expected[:3], strict=True))
        student = case.student(batch)
        assert torch.equal(
            algorithm.token_loss(student, batch, credit).loss,
            grpo.token_loss(student, batch, expected).loss,
        )


def test_a_micro_batch_has_the_losses_of_the_whole():
    algorithm = SRPO()
    for seed in range(10):
        case = random_case(seed)
        batch = case.batch(algorithm.needs)
        credit = algorithm.assign_credit(batch, 0)
        whole = algorithm.token_loss(case.student(batch), batch, credit).loss
        tokens = torch.arange(len(whole)).flip(0)[::2]
        part = batch.at(tokens)
        student = FakeStudent(
            torch.tensor(case.logprobs)[tokens],
            logits=torch.tensor(case.student_logits)[tokens],
            batch=part,
        )
        actual = algorithm.token_loss(student, part, credit.at(tokens)).loss
        torch.testing.assert_close(actual, whole[tokens])


def test_the_teacher_never_reads_a_correct_rollout():
    batch = random_case(3).batch(SRPO().needs)
    context = {"teacher": torch.ones_like(batch.is_correct)}
    assert torch.equal(SRPO().rows_to_score(batch, context, 0), ~batch.is_correct)


@pytest.mark.parametrize(("field", "value"), [("beta", -1.0), ("max_importance_ratio", 0.0)])
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} .*{value}"):
        SRPO(**{field: value})
