import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.cepo import CEPO
from megasd.algorithms.grpo import GRPO
from megasd.types import Credit, ResponseBatch, TeacherScores
from tests.unit import cases

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two
NEEDS = Needs(teachers=("teacher", "wrong[0]"))
RIGHT = [0.3, -1.0, 2.0, 0.3, -1.0, 2.0, 0.5]  # gaps to the old log-probs
WRONG = [0.2, 1.0, 2.0, 0.2, 1.0, -3.0, -0.5]


def batch_of(right: Sequence[float], wrong: Sequence[float]) -> ResponseBatch:
    """One right and one wrong rollout of a group, then a lone one."""
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
            role: TeacherScores(
                has_context=torch.ones(3, dtype=torch.bool),
                logprobs=old_logprobs + torch.tensor(gaps),
            )
            for role, gaps in (("teacher", right), ("wrong[0]", wrong))
        },
    )


def without(batch: ResponseBatch, role: str, rollouts: Sequence[int]) -> ResponseBatch:
    """The batch where the role has read nothing of these rollouts."""
    assert batch.old_logprobs is not None
    has_context = batch.has_context(role).clone()
    has_context[list(rollouts)] = False
    read = has_context[batch.rollout_ids]
    logprobs = torch.where(read, batch.teachers[role].logprobs, batch.old_logprobs)
    scores = TeacherScores(has_context=has_context, logprobs=logprobs)
    return dataclasses.replace(batch, teachers={**batch.teachers, role: scores})


def assert_same(actual: Credit, expected: Credit) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_credit_by_hand():
    credit = CEPO(mix=0.5, max_deviation=0.2).assign_credit(batch_of(RIGHT, WRONG), 0)
    # E = 0.1, -2, 0 | 0.1, -2, 5: what both answers favour alike earns nothing more
    weights = [math.exp(0.1), 0.8, 1.0, math.exp(-0.1), 1.2, 0.8]
    expected = [sign * (0.5 + 0.5 * w) for sign, w in zip([A] * 3 + [-A] * 3, weights, strict=True)]
    assert credit.advantages.tolist() == pytest.approx([*expected, 0], rel=1e-5)
    assert credit.token_weights.tolist() == [1] * 6 + [0]
    assert credit.path.tolist() == [0] * 7
    assert credit.metrics == {"contrasted": 1.0}


@pytest.mark.parametrize("role", ["teacher", "wrong[0]"])
def test_one_reading_without_the_other_is_no_evidence(role):
    batch = batch_of(RIGHT, WRONG)
    both = CEPO().assign_credit(batch, 0)
    one = CEPO().assign_credit(without(batch, role, [1]), 0)
    assert torch.equal(one.advantages[:3], both.advantages[:3])
    assert torch.equal(one.advantages[3:], GRPO().assign_credit(batch, 0).advantages[3:])
    assert one.metrics["contrasted"] == pytest.approx(2 / 3)


def test_mix_falls_linearly_to_zero_in_25_steps():
    batch = batch_of([1.0] * 7, [0.0] * 7)
    actual = [CEPO().assign_credit(batch, step).advantages[0].item() for step in (0, 5, 24, 25)]
    mixes = [0.5, 0.4, 0.02, 0]
    assert actual == pytest.approx([A * (1 + 0.2 * mix) for mix in mixes], rel=1e-6)


def test_the_teachers_read_only_what_can_change_the_update():
    batch = batch_of(RIGHT, WRONG)
    has = torch.ones(3, dtype=torch.bool)
    contexts = {"teacher": has, "wrong[0]": has}
    assert CEPO().rows_to_score(batch, contexts, 24).tolist() == [True, True, False]
    one_missing = {**contexts, "wrong[0]": torch.tensor([False, True, True])}
    assert CEPO().rows_to_score(batch, one_missing, 0).tolist() == [False, True, False]
    assert not CEPO().rows_to_score(batch, contexts, 25).any()
    assert CEPO().needs == NEEDS


def test_without_mix_or_context_or_difference_it_is_grpo_bit_for_bit():
    for seed in range(20):
        batch = cases.random_case(seed).batch(NEEDS)
        expected = GRPO().assign_credit(batch, 0)
        assert_same(CEPO(mix=0.0).assign_credit(batch, 0), expected)
        assert_same(CEPO().assign_credit(batch, 25), expected)
        for roles in ([], ["teacher"], ["wrong[0]"]):
            teachers = {role: batch.teachers[role] for role in roles}
            some = dataclasses.replace(batch, teachers=teachers)
            assert_same(CEPO(mix=1.0).assign_credit(some, 0), expected)
        same = dict.fromkeys(NEEDS.teachers, batch.teachers["teacher"])
        agreeing = dataclasses.replace(batch, teachers=same)
        assert_same(CEPO(mix=1.0).assign_credit(agreeing, 0), expected)


@pytest.mark.parametrize(("mix", "deviation"), [(0.5, 0.2), (1.0, 0.99), (0.5, 1.9)])
def test_no_answer_flips_the_verifier_s_sign(mix, deviation):
    for seed in range(50):
        batch = cases.random_case(seed).batch(NEEDS)
        grpo = GRPO().assign_credit(batch, 0).advantages
        actual = CEPO(mix=mix, max_deviation=deviation).assign_credit(batch, 0).advantages
        assert torch.equal(actual.sign(), grpo.sign())
        weights = (actual / grpo)[grpo != 0]
        assert (weights >= 1 - mix * deviation - 1e-5).all()
        assert (weights <= 1 + mix * deviation + 1e-5).all()


@pytest.mark.parametrize("gap", [50.0, 200.0])
def test_huge_gaps_end_at_the_clip(gap):
    batch = batch_of([gap, -gap, gap] * 2 + [gap], [-gap, gap, gap] * 2 + [-gap])
    actual = CEPO(mix=0.5, max_deviation=0.2).assign_credit(batch, 0).advantages.tolist()
    expected = [1.1 * A, 0.9 * A, A, -0.9 * A, -1.1 * A, -A, 0]
    assert actual == pytest.approx(expected, rel=1e-6)


def test_every_default_says_where_it_stands():
    named = {f.name for f in dataclasses.fields(CEPO)} | {
        f"{section}.{key}" for section, keys in CEPO.section_defaults.items() for key in keys
    }
    assert set(CEPO.sources) == named
