import dataclasses
import math

import pytest
import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.grpo import GRPO
from megasd.algorithms.rlrt import RLRT
from megasd.algorithms.rlsd import RLSD
from megasd.types import Credit, ResponseBatch, TeacherScores
from tests.unit import cases, reference

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two


@pytest.fixture
def batch() -> ResponseBatch:
    """Rollouts 0 right, 1 wrong; 2 right without context, 3 wrong; 4 and 5 both right."""
    old_logprobs = torch.full((8,), -3.0)
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]),
        is_correct=torch.tensor([True, False, True, False, True, True]),
        group_ids=torch.tensor([5, 5, 6, 6, 7, 7]),
        minibatch_ids=torch.zeros(6, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 0, 1, 2, 3, 4, 5]),
        response_mask=torch.ones(8, dtype=torch.bool),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            "teacher": TeacherScores(
                has_context=torch.tensor([True, True, False, True, True, True]),
                logprobs=old_logprobs + torch.tensor([0.1, -2.0, 50.0, 0.5, 0.0, 0.5, 0.5, 0.5]),
            )
        },
    )


def assert_same(actual: Credit, expected: Credit) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_credit_by_hand(batch):
    credit = RLRT(mix=0.5, max_deviation=0.5).assign_credit(batch, 0)
    # a token that the teacher did not expect earns more: the clips are 0.5 and 1.5
    weights = [math.exp(-0.1), 1.5, 0.5]
    expected = [A * (0.5 + 0.5 * w) for w in weights]
    assert credit.advantages.tolist() == pytest.approx([*expected, -A, A, -A, 0, 0], rel=1e-5)
    assert credit.token_weights.tolist() == [1] * 6 + [0, 0]
    assert credit.path.tolist() == [0] * 8
    assert credit.metrics == {"weight_clipped": pytest.approx(2 / 3)}, "of the correct rollout"


def test_the_ablation_weighs_incorrect_rollouts_too(batch):
    credit = RLRT(mix=0.5, max_deviation=0.5, gate="all").assign_credit(batch, 0)
    # there a token that the teacher expected is blamed more
    assert credit.advantages[[3, 5]].tolist() == pytest.approx([-A * 1.25, -A * 1.25], rel=1e-5)


def test_the_teacher_reads_only_correct_rollouts_that_beat_their_group(batch):
    has_context = {"teacher": batch.has_context()}
    rows = RLRT().rows_to_score(batch, has_context, 1000)  # base models: the mix stays
    assert rows.tolist() == [True, False, True, False, False, False]
    rows = RLRT(gate="all").rows_to_score(batch, has_context, 0)
    assert rows.tolist() == [True, True, True, True, False, False]
    assert not RLRT(mix_steps=30).rows_to_score(batch, has_context, 30).any()


@pytest.mark.parametrize("gate", ["correct", "all"])
def test_without_mix_or_context_it_is_grpo_bit_for_bit(gate):
    for seed in range(30):
        case = cases.random_case(seed)
        expected = GRPO().assign_credit(case.batch(), 0)
        assert_same(RLRT(gate=gate, mix=0.0).assign_credit(case.batch(), 0), expected)
        assert_same(RLRT(gate=gate, mix_steps=30).assign_credit(case.batch(), 30), expected)
        nobody = case.batch(Needs())
        assert_same(RLRT(gate=gate).assign_credit(nobody, 0), expected)


def test_the_weight_is_one_over_rlsd_s_where_correct_and_one_elsewhere():
    correct_tokens = 0
    for seed in range(50):
        batch = cases.random_case(seed).batch()
        assert batch.old_logprobs is not None
        gap = 0.6 * batch.teacher_gap().tanh()  # exp of it stays within the clips
        teacher = dataclasses.replace(batch.teachers["teacher"], logprobs=batch.old_logprobs + gap)
        batch = dataclasses.replace(batch, teachers={"teacher": teacher})
        grpo = GRPO().assign_credit(batch, 0).advantages
        rlrt = RLRT(mix=1.0, max_deviation=0.99).assign_credit(batch, 0).advantages
        rlsd = RLSD(mix=1.0, max_deviation=0.99).assign_credit(batch, 0).advantages
        correct = batch.is_correct[batch.rollout_ids] & (grpo != 0)
        product = (rlrt / grpo)[correct] * (rlsd / grpo)[correct]
        assert product.tolist() == pytest.approx([1.0] * len(product), rel=1e-4)
        incorrect = ~batch.is_correct[batch.rollout_ids]
        assert torch.equal(rlrt[incorrect], grpo[incorrect])
        correct_tokens += int((gap[correct].abs() > 0.1).sum())
    assert correct_tokens > 50


def test_what_is_correct_is_the_reward_section_s_threshold(batch):
    lenient = dataclasses.replace(batch, is_correct=torch.ones(6, dtype=torch.bool))
    assert_same(RLRT().assign_credit(lenient, 0), RLRT(gate="all").assign_credit(batch, 0))


def test_two_hundred_random_batches_equal_the_plain_reference():
    for seed in range(200):
        case, step = cases.random_case(seed), seed % 40
        mix, max_deviation = [0.5, 0.9][seed % 2], [0.2, 0.5, 1.0][seed % 3]
        algorithm = RLRT(mix=mix, mix_steps=30, max_deviation=max_deviation)
        advantages = reference.group_advantages(case.rewards, case.group_ids, scale_by_std=True)
        expected = []
        for token, rollout in enumerate(case.rollout_ids):
            advantage = advantages[rollout]
            gap = case.teacher_logprobs[token] - case.old_logprobs[token]
            weight = 1.0
            if case.rewards[rollout] >= 1 and advantage != 0:
                weight = math.exp(-gap if advantage > 0 else gap)
                weight = min(max(weight, 1 - max_deviation), 1 + max_deviation)
            now = mix * max(0, 30 - step) / 30
            expected.append(advantage * (1 - now + now * weight))
        credit = algorithm.assign_credit(case.batch(), step)
        assert credit.advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert credit.path.tolist() == case.path


def test_a_weight_that_could_flip_a_sign_is_refused():
    with pytest.raises(ValueError, match=r"^algorithm\.mix x algorithm\.max_deviation .*below 1"):
        RLRT(mix=1.0)
