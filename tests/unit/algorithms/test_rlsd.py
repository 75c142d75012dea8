import dataclasses
import math

import pytest
import torch

from megasd.algorithms.grpo import GRPO
from megasd.algorithms.rlsd import RLSD
from megasd.types import Credit, ResponseBatch, TeacherScores
from tests.unit import cases, reference
from tests.unit.cases import FakeStudent

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two
GAPS = [0.1, -2.0, 2.0, 0.1, -2.0, 2.0, 2.0]


@pytest.fixture
def batch() -> ResponseBatch:
    """One right and one wrong rollout of a group, then a lone one; gaps as above."""
    old_logprobs = torch.full((7,), -3.0)
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        is_correct=torch.tensor([True, False, True]),
        group_ids=torch.tensor([5, 5, 6]),
        minibatch_ids=torch.zeros(3, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
        response_mask=torch.ones(7, dtype=torch.bool),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            "teacher": TeacherScores(
                has_context=torch.tensor([True, True, True]),
                logprobs=old_logprobs + torch.tensor(GAPS),
            )
        },
    )


def pessimistic(**fields) -> RLSD:
    with pytest.warns(UserWarning, match=r"^algorithm\.credit: pessimistic"):
        return RLSD(credit="pessimistic", **fields)


def assert_same(actual: Credit, expected: Credit) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_credit_by_hand(batch):
    credit = RLSD(mix=0.5, max_deviation=0.2).assign_credit(batch, 0)
    # a token the teacher likes earns more in a good rollout and is blamed less in a bad one
    weights = [math.exp(0.1), 0.8, 1.2, math.exp(-0.1), 1.2, 0.8]
    signs = [A, A, A, -A, -A, -A]
    expected = [sign * (0.5 + 0.5 * w) for sign, w in zip(signs, weights, strict=True)]
    assert credit.advantages.tolist() == pytest.approx([*expected, 0], rel=1e-5)
    assert credit.token_weights.tolist() == [1] * 6 + [0]
    assert credit.path.tolist() == [0] * 7
    # Of the tokens that were read and have an advantage; exp(0.1) and exp(-0.1) stay inside.
    assert credit.metrics == {"weight_clipped": pytest.approx(4 / 6)}


def test_pessimistic_credit_by_hand(batch):
    actual = pessimistic(mix=0.5).assign_credit(batch, 0).advantages
    # min[w A, clip(w) A]: no clip from below for A > 0, nor from above for A < 0
    weights = [math.exp(0.1), math.exp(-2), 1.2, math.exp(-0.1), math.exp(2), 0.8]
    signs = [A, A, A, -A, -A, -A]
    expected = [sign * (0.5 + 0.5 * w) for sign, w in zip(signs, weights, strict=True)]
    assert actual.tolist() == pytest.approx([*expected, 0], rel=1e-5)


def test_mix_falls_linearly_to_zero():
    algorithm = RLSD(mix=0.5, mix_steps=50)
    mixes = [algorithm.mix_at(step) for step in (0, 10, 25, 49, 50, 99)]
    assert mixes == pytest.approx([0.5, 0.4, 0.25, 0.01, 0, 0])
    assert RLSD(mix=0.3, mix_steps=None).mix_at(10_000) == 0.3


def test_the_teacher_reads_only_what_can_change_the_update(batch):
    algorithm = RLSD(mix_steps=50)
    assert algorithm.rows_to_score(batch, {}, 49).tolist() == [True, True, False]
    assert not algorithm.rows_to_score(batch, {}, 50).any()
    assert not RLSD(mix=0.0).rows_to_score(batch, {}, 0).any()


def test_nothing_is_sampled_anew(batch):
    assert RLSD().rows_to_keep(batch.rewards, batch.group_ids, 0).all()


@pytest.mark.parametrize("mix", [0.3, 0.5, 1.0])
def test_a_teacher_that_agrees_or_has_no_context_leaves_grpo_bit_for_bit(mix):
    for seed in range(20):
        batch = cases.random_case(seed).batch()
        assert batch.old_logprobs is not None
        teacher = dataclasses.replace(batch.teachers["teacher"], logprobs=batch.old_logprobs)
        agreeing = dataclasses.replace(batch, teachers={"teacher": teacher})
        for algorithm in (RLSD(mix=mix), pessimistic(mix=mix)):
            assert_same(algorithm.assign_credit(agreeing, 0), GRPO().assign_credit(batch, 0))


def test_without_mix_it_is_grpo_bit_for_bit_and_needs_no_scores():
    for seed in range(20):
        batch = dataclasses.replace(cases.random_case(seed).batch(), teachers={})
        expected = GRPO().assign_credit(batch, 0)
        assert_same(RLSD(mix=0.0).assign_credit(batch, 0), expected)
        assert_same(RLSD(mix_steps=50).assign_credit(batch, 50), expected)


def test_the_loss_is_grpo_s_on_the_same_credit(batch):
    credit = RLSD().assign_credit(batch, 0)
    student = FakeStudent(torch.linspace(-4, -2, 7))
    actual, expected = (
        algorithm.token_loss(student, batch, credit) for algorithm in (RLSD(), GRPO())
    )
    assert torch.equal(actual.loss, expected.loss)


@pytest.mark.parametrize(("mix", "deviation"), [(0.5, 0.2), (1.0, 0.99), (0.5, 1.9), (0.01, 90.0)])
def test_the_teacher_never_flips_the_verifier_s_sign(mix, deviation):
    for seed in range(50):
        batch = cases.random_case(seed).batch()
        grpo = GRPO().assign_credit(batch, 0).advantages
        actual = RLSD(mix=mix, max_deviation=deviation).assign_credit(batch, 0).advantages
        assert torch.equal(actual.sign(), grpo.sign())
        weights = (actual / grpo)[grpo != 0]
        assert (weights >= 1 - mix * deviation - 1e-5).all()
        assert (weights <= 1 + mix * deviation + 1e-5).all()


@pytest.mark.parametrize(("mix", "deviation"), [(0.5, 2.0), (1.0, 1.0)])
def test_a_weight_that_could_flip_a_sign_is_refused(mix, deviation):
    with pytest.raises(ValueError, match=r"^algorithm\.mix x algorithm\.max_deviation .*below 1"):
        RLSD(mix=mix, max_deviation=deviation)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mix", 1.1), ("mix", -0.1), ("mix_steps", 0), ("max_deviation", -0.2)],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} .*{value}"):
        RLSD(**{field: value})


def test_the_paper_s_teacher_and_context_are_the_defaults():
    assert RLSD.section_defaults == {
        "teacher": {"weights": "snapshot", "every": 10},
        "context": {"sources": ["answer"]},
    }


def test_two_hundred_random_batches_equal_the_plain_reference():
    for seed in range(200):
        case, step = cases.random_case(seed), seed % 60
        mix, max_deviation = [0.5, 0.9][seed % 2], [0.2, 0.5, 1.0][seed % 3]
        scale_by_std, is_pessimistic = seed % 4 > 0, seed % 5 == 0
        make = pessimistic if is_pessimistic else RLSD
        algorithm = make(mix=mix, max_deviation=max_deviation, scale_by_std=scale_by_std)
        per_rollout = reference.group_advantages(
            case.rewards, case.group_ids, scale_by_std=scale_by_std
        )
        expected = [
            reference.rlsd_advantage(
                per_rollout[rollout],
                teacher - old,
                mix=mix * (50 - step) / 50 if step < 50 else 0.0,
                max_deviation=max_deviation,
                pessimistic=is_pessimistic,
            )
            for rollout, teacher, old in zip(
                case.rollout_ids, case.teacher_logprobs, case.old_logprobs, strict=True
            )
        ]
        credit = algorithm.assign_credit(case.batch(), step)
        assert credit.advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=0)
        assert credit.path.tolist() == case.path
        assert credit.token_weights.tolist() == [
            used and per_rollout[rollout] != 0
            for used, rollout in zip(case.response_mask, case.rollout_ids, strict=True)
        ]
