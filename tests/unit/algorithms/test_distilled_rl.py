import dataclasses
import math
import statistics
from collections.abc import Sequence

import pytest
import torch

from megasd.algorithms.distilled_rl import DistilledRL
from megasd.algorithms.grpo import GRPO
from megasd.types import Credit, ResponseBatch, TeacherScores
from tests.unit import cases

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two


def batch_of(gaps: Sequence[float], response_mask: Sequence[bool] = (True,) * 7) -> ResponseBatch:
    """One right and one wrong rollout of a group, then a lone one."""
    old_logprobs = torch.full((7,), -3.0)
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        is_correct=torch.tensor([True, False, True]),
        group_ids=torch.tensor([5, 5, 6]),
        minibatch_ids=torch.zeros(3, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
        response_mask=torch.tensor(response_mask),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            "teacher": TeacherScores(
                has_context=torch.ones(3, dtype=torch.bool),
                logprobs=old_logprobs + torch.tensor(gaps),
            )
        },
    )


def assert_same(actual: Credit, expected: Credit) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_credit_by_hand():
    batch = batch_of([math.log(2), -math.log(2), 5.0, 1.0, -1.0, 5.0, 1.0])
    credit = DistilledRL().assign_credit(batch, 0)
    # q = 2, 1/2, 3 (clipped), their geometric mean is the cube root of 3
    mean = 3 ** (1 / 3)
    expected = [A * 2 / mean, A * 0.5 / mean, A * 3 / mean, -A, -A, -A, 0]
    assert credit.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert credit.token_weights.tolist() == [1] * 6 + [0]
    assert credit.metrics["ratio_clipped"] == pytest.approx(1 / 3)


def test_the_geometric_mean_is_over_response_tokens_only():
    batch = batch_of([0.2, 1.0, -0.4, 0, 0, 0, 0], [True, False, True, True, True, True, True])
    actual = DistilledRL().assign_credit(batch, 0).advantages[[0, 2]]
    assert actual.tolist() == pytest.approx([A * math.exp(0.3), A * math.exp(-0.3)], rel=1e-5)


def test_shares_of_a_good_rollout_multiply_to_one_and_no_sign_flips():
    for seed in range(50):
        case = cases.random_case(seed)
        batch = case.batch()
        grpo = GRPO().assign_credit(batch, 0).advantages
        actual = DistilledRL(max_ratio=[3.0, 20.0][seed % 2]).assign_credit(batch, 0).advantages
        assert torch.equal(actual.sign(), grpo.sign())
        for rollout in range(len(case.rewards)):
            tokens = (batch.rollout_ids == rollout) & batch.response_mask & (grpo > 0)
            if tokens.any():
                shares = (actual[tokens] / grpo[tokens]).tolist()
                assert statistics.geometric_mean(shares) == pytest.approx(1, rel=1e-5)


def test_a_bad_rollout_learns_from_its_reward_only():
    for seed in range(20):
        batch = cases.random_case(seed).batch()
        grpo = GRPO().assign_credit(batch, 0).advantages
        actual = DistilledRL().assign_credit(batch, 0).advantages
        assert torch.equal(actual[grpo <= 0], grpo[grpo <= 0])


def test_without_context_or_room_for_ratios_it_is_grpo_bit_for_bit():
    for seed in range(20):
        batch = cases.random_case(seed).batch()
        expected = GRPO().assign_credit(batch, 0)
        assert_same(DistilledRL(max_ratio=1.0).assign_credit(batch, 0), expected)
        unread = dataclasses.replace(batch, teachers={})
        assert_same(DistilledRL().assign_credit(unread, 0), expected)


def test_the_teacher_reads_only_good_rollouts():
    batch = batch_of([0.0] * 7)
    contexts = {"teacher": torch.tensor([True, True, True])}
    assert DistilledRL().rows_to_score(batch, contexts, 0).tolist() == [True, False, False]
    assert not DistilledRL(max_ratio=1.0).rows_to_score(batch, contexts, 0).any()


@pytest.mark.parametrize("gap", [50.0, 200.0])
def test_huge_gaps_end_at_the_clip(gap):
    credit = DistilledRL().assign_credit(batch_of([gap, -gap, gap, gap, -gap, gap, gap]), 0)
    mean = 3 ** (1 / 3)  # of 3, 1/3 and 3
    expected = [A * 3 / mean, A / 3 / mean, A * 3 / mean, -A, -A, -A, 0]
    assert credit.advantages.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [0.5, -3.0, math.inf, math.nan])
def test_an_impossible_bound_is_refused_by_name(value):
    with pytest.raises(ValueError, match=rf"^algorithm\.max_ratio .*{value}"):
        DistilledRL(max_ratio=value)


def test_every_default_says_where_it_stands():
    named = {f.name for f in dataclasses.fields(DistilledRL)} | {
        f"{section}.{key}" for section, keys in DistilledRL.section_defaults.items() for key in keys
    }
    assert set(DistilledRL.sources) == named
