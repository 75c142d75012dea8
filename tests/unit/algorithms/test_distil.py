import dataclasses
import math
import random

import pytest
import torch

from megasd.algorithms.distil import DistIL
from megasd.algorithms.grpo import GRPO
from megasd.losses.distillation import future_credit, group_position_mean
from megasd.losses.divergence import divergence
from megasd.losses.policy_gradient import clipped_surrogate
from megasd.types import ResponseBatch
from tests.unit.cases import VOCABULARY, Case, FakeStudent, random_case


def losses(algorithm, case: Case, batch: ResponseBatch | None = None):
    batch = case.batch(algorithm.needs) if batch is None else batch
    student = case.student(batch)
    credit = algorithm.assign_credit(batch, 0)
    return batch, student, credit, algorithm.token_loss(student, batch, credit).loss


def test_future_credit_by_hand():
    values = torch.tensor([7.0, 1.0, 100.0, 2.0, 4.0, 5.0])
    counted = torch.tensor([True, True, False, True, True, True])
    rollout_ids = torch.tensor([0, 0, 0, 0, 0, 1])
    credit, has_future = future_credit(values, counted, rollout_ids)
    # the masked 100 is in no mean; the last token of each rollout answers for nothing
    assert credit.tolist() == pytest.approx([7 / 3, 3, 3, 4, 0, 0])
    assert has_future.tolist() == [True, True, True, True, False, False]


def test_future_credit_is_the_double_loop_s_in_any_order_of_rollouts():
    for seed in range(100):
        rng, case = random.Random(seed), random_case(seed)
        rollouts = list(range(len(case.rewards)))
        rng.shuffle(rollouts)
        tokens = [t for r in rollouts for t, owner in enumerate(case.rollout_ids) if owner == r]
        values = [case.roles["teacher"].cross_entropy[token] for token in tokens]
        owners = [case.rollout_ids[token] for token in tokens]
        counted = [case.response_mask[token] for token in tokens]
        expected = []
        for t, owner in enumerate(owners):
            later = [
                values[tau]
                for tau in range(t + 1, len(tokens))
                if owners[tau] == owner and counted[tau]
            ]
            expected.append(sum(later) / len(later) if later else 0.0)
        actual, _ = future_credit(torch.tensor(values), torch.tensor(counted), torch.tensor(owners))
        assert actual.tolist() == pytest.approx(expected, rel=1e-6, abs=0)


def test_group_position_mean_is_the_plain_one():
    for seed in range(50):
        case = random_case(seed)
        values = case.roles["teacher"].cross_entropy
        places = [case.rollout_ids[:t].count(owner) for t, owner in enumerate(case.rollout_ids)]
        cells = [
            (case.group_ids[owner], place)
            for owner, place in zip(case.rollout_ids, places, strict=True)
        ]
        expected = []
        for cell in cells:
            peers = [
                value
                for value, other, used in zip(values, cells, case.response_mask, strict=True)
                if used and other == cell
            ]
            expected.append(sum(peers) / len(peers) if peers else 0.0)
        actual = group_position_mean(
            torch.tensor(values),
            torch.tensor(case.response_mask),
            torch.tensor(case.rollout_ids),
            torch.tensor(case.group_ids),
        )
        assert actual.tolist() == pytest.approx(expected, rel=1e-6, abs=0)


def test_loss_is_the_cross_entropy_plus_the_surrogate_of_the_future():
    num_tame = 0
    for seed in range(30):
        case = random_case(seed)
        batch, student, credit, loss = losses(DistIL(), case)
        used = [
            is_used and case.has_context[owner]
            for is_used, owner in zip(case.response_mask, case.rollout_ids, strict=True)
        ]
        assert credit.path.tolist() == [int(is_used) - 1 for is_used in used]
        assert credit.token_weights.tolist() == used
        costs = torch.tensor(case.roles["teacher"].cross_entropy)
        future, _ = future_credit(costs, torch.tensor(used), batch.rollout_ids)
        assert credit.advantages.tolist() == torch.where(torch.tensor(used), -future, 0.0).tolist()
        assert (credit.advantages <= 0).all()

        student_rows = torch.tensor(case.student_logits, dtype=torch.float64).log_softmax(-1)
        teacher_rows = torch.tensor(case.teacher_logits, dtype=torch.float64).log_softmax(-1)
        expected = []
        for s, t, ids in zip(student_rows, teacher_rows, case.ids, strict=True):
            rest = [i for i in range(VOCABULARY) if i not in ids]
            total = -(t[ids].exp() * s[ids]).sum()
            if rest:
                total -= t[rest].exp().sum() * s[rest].exp().sum().log()
            expected.append(total)
        assert batch.old_logprobs is not None
        surrogate = clipped_surrogate(
            student.logprobs, batch.old_logprobs, credit.advantages, clip=DistIL().clip
        ).loss
        actual = DistIL().cross_entropies(student, batch)
        assert torch.equal(loss, actual + surrogate)
        # in float32 the tail's mass is good to about 1e-7, so its logarithm only where it is large
        is_tame = student_rows.exp().amin(dim=1) > 1e-3
        num_tame += int(is_tame.sum())
        expected = torch.stack(expected).float()
        torch.testing.assert_close(actual[is_tame], expected[is_tame], rtol=1e-3, atol=1e-4)
    assert num_tame > 50


def test_the_future_is_the_advantage_of_an_ordinary_surrogate():
    case = random_case(4)
    _, student, credit, loss = losses(DistIL(), case)
    (gradient,) = torch.autograd.grad(loss.sum(), student.logprobs)
    ratio = (torch.tensor(case.logprobs) - torch.tensor(case.old_logprobs)).clamp(-20, 20).exp()
    is_open = (ratio > 0.8) & (ratio < math.exp(20))  # advantages are negative: the low clip
    expected = torch.where(is_open, -credit.advantages * ratio, 0.0)
    torch.testing.assert_close(gradient, expected)
    assert gradient.any()


def test_without_future_credit_the_gradient_is_forward_kl_s_on_the_same_support_and_tail():
    algorithm = DistIL(future_credit=False)
    assert not algorithm.needs.cross_entropy
    assert not algorithm.needs.old_logprobs
    for seed in range(30):
        case = random_case(seed)
        batch, student, credit, loss = losses(algorithm, case)
        assert not credit.advantages.any()
        assert student.logits is not None
        (actual,) = torch.autograd.grad(loss.sum(), student.logits)
        assert batch.support is not None
        assert batch.support.teacher_logprobs is not None
        forward_kl = divergence(
            student.support_logprobs,
            batch.support.teacher_logprobs,
            kind="forward_kl",
            rest="tail",
            vocab_size=VOCABULARY,
        )
        (expected,) = torch.autograd.grad(forward_kl.sum(), student.logits)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert expected.any()


def test_it_learns_where_every_reward_is_0_and_grpo_cannot():
    for seed in range(20):
        case = random_case(seed)
        case = dataclasses.replace(case, rewards=[0.0] * len(case.rewards))
        _, student, credit, loss = losses(GRPO(), case)
        assert not credit.token_weights.any()
        (gradient,) = torch.autograd.grad(loss.sum(), student.logprobs)
        assert not gradient.any()
        _, student, credit, loss = losses(DistIL(), case)
        total = (loss * credit.token_weights).sum()
        assert student.logits is not None
        by_logits, _ = torch.autograd.grad(total, (student.logits, student.logprobs))
        assert bool(by_logits.any()) == bool(credit.token_weights.any())


def test_samples_in_the_teacher_s_proportions_give_its_cross_entropy():
    # T = (1/2, 1/4, 1/4) on ids 0, 1, 2, drawn exactly as often
    algorithm = DistIL(teacher="samples", num_samples=4)
    assert (algorithm.needs.support, algorithm.needs.support_size) == ("samples", 4)
    case = random_case(2)
    case = dataclasses.replace(case, ids=[[0, 0, 1, 2] for _ in case.ids])
    _, student, _, _ = losses(algorithm, case)
    _, _, _, loss = losses(dataclasses.replace(algorithm, future_credit=False), case)
    assert student.logits is not None
    logprobs = student.logits.log_softmax(-1)
    expected = -(logprobs[:, 0] / 2 + logprobs[:, 1] / 4 + logprobs[:, 2] / 4)
    torch.testing.assert_close(loss, expected)


def test_the_baseline_takes_the_group_s_mean_at_the_position_away():
    case = dataclasses.replace(
        random_case(0),
        rewards=[0.0, 0.0, 0.0],
        group_ids=[8, 8, 9],
        minibatch_ids=[0, 0, 0],
        rollout_ids=[0, 0, 0, 1, 1, 2, 2],
        response_mask=[True] * 7,
    )
    needs = DistIL().needs
    batch = shortened(case, 7).batch(needs)
    teacher = dataclasses.replace(
        batch.teachers["teacher"],
        has_context=torch.tensor([True, True, True]),
        cross_entropy=torch.tensor([9.0, 1.0, 3.0, 9.0, 4.0, 9.0, 5.0]),
    )
    batch = dataclasses.replace(batch, teachers={"teacher": teacher})
    # C = 2 3 - | 4 - | 5 -; means of the first group: 3 3 -, for last tokens have no C
    actual = DistIL(baseline="group_position").assign_credit(batch, 0)
    assert actual.advantages.tolist() == pytest.approx([1, 0, 0, -1, 0, 0, 0])
    assert actual.metrics["future_credit"] == pytest.approx(2.0)
    lone = dataclasses.replace(batch, group_ids=torch.tensor([7, 8, 9]))
    with pytest.raises(ValueError, match=r"^algorithm\.baseline: group_position .*group_size"):
        DistIL(baseline="group_position").assign_credit(lone, 0)


def shortened(case: Case, num_tokens: int) -> Case:
    """The per-token lists repeated or cut to another number of tokens."""

    def fit(values: list) -> list:
        return (values * num_tokens)[:num_tokens]

    teacher = case.roles["teacher"]
    role = dataclasses.replace(
        teacher,
        **{name: fit(getattr(teacher, name)) for name in ("logprobs", "entropy", "cross_entropy")},
    )
    names = ("logprobs", "old_logprobs", "entropy", "student_logits", "teacher_logits", "ids")
    return dataclasses.replace(
        case, roles={"teacher": role}, **{name: fit(getattr(case, name)) for name in names}
    )


def test_a_batch_that_no_teacher_read_teaches_nothing():
    batch = dataclasses.replace(random_case(0).batch(DistIL().needs), teachers={}, support=None)
    credit = DistIL().assign_credit(batch, 0)
    assert not credit.token_weights.any()
    assert (credit.path == -1).all()


def test_a_micro_batch_has_the_losses_of_the_whole():
    for seed in range(10):
        case = random_case(seed)
        batch, _, credit, whole = losses(DistIL(), case)
        tokens = torch.arange(len(whole)).flip(0)[::2]
        part = batch.at(tokens)
        student = FakeStudent(
            torch.tensor(case.logprobs)[tokens],
            logits=torch.tensor(case.student_logits)[tokens],
            batch=part,
        )
        actual = DistIL().token_loss(student, part, credit.at(tokens)).loss
        torch.testing.assert_close(actual, whole[tokens])


@pytest.mark.parametrize("teacher", ["distribution", "samples"])
def test_extreme_logits_leave_loss_and_gradients_finite(teacher):
    algorithm = DistIL(teacher=teacher)
    for seed in range(20):
        case = random_case(seed)
        role = case.roles["teacher"]
        huge = dataclasses.replace(role, cross_entropy=[1e4 * h for h in role.cross_entropy])
        case = dataclasses.replace(
            case,
            roles={**case.roles, "teacher": huge},
            student_logits=[[300 * x for x in row] for row in case.student_logits],
            teacher_logits=[[300 * x for x in row] for row in case.teacher_logits],
        )
        _, student, _, loss = losses(algorithm, case)
        assert student.logits is not None
        gradients = torch.autograd.grad(loss.sum(), (student.logits, student.logprobs))
        assert loss.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"top_k": 0}, "top_k"),
        ({"num_samples": 0}, "num_samples"),
        ({"baseline": "group_position", "future_credit": False}, "baseline"),
    ],
)
def test_an_impossible_value_is_refused_by_name(fields, key):
    with pytest.raises(ValueError, match=rf"^algorithm\.{key} "):
        DistIL(**fields)
