import math

import pytest
import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.entropy_bonus import EntropyBonus
from megasd.algorithms.grpo import GRPO
from megasd.types import ResponseBatch
from tests.unit import cases

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two


@pytest.fixture
def batch() -> ResponseBatch:
    """One right and one wrong rollout of a group, then a lone one."""
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        is_correct=torch.tensor([True, False, True]),
        group_ids=torch.tensor([5, 5, 6]),
        minibatch_ids=torch.zeros(3, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
        response_mask=torch.ones(7, dtype=torch.bool),
        max_response_tokens=4,
        entropy=torch.tensor([0.0, 0.5, 3.0, 0.0, 0.5, 3.0, 3.0]),
    )


def test_credit_by_hand(batch):
    credit = EntropyBonus(alpha=0.4, kappa=2.0).assign_credit(batch, 0)
    # 0.4 H, but never more than half the size of A: 0.4 x 3 is, 0.4 x 0.5 is not
    expected = [A, A + 0.2, 1.5 * A, -A, -A + 0.2, -0.5 * A, 0]
    assert credit.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert credit.token_weights.tolist() == [1] * 6 + [0]
    assert credit.metrics["entropy_bonus"] == pytest.approx((2 * 0.2 + A) / 7, rel=1e-5)


def test_the_bonus_never_exceeds_its_cap_nor_flips_a_sign():
    for seed in range(50):
        batch = cases.random_case(seed).batch(Needs(entropy=True))
        grpo = GRPO().assign_credit(batch, 0).advantages
        actual = EntropyBonus(alpha=100.0, kappa=1.5).assign_credit(batch, 0).advantages
        bonus = actual - grpo
        assert (bonus >= 0).all()
        assert (bonus <= grpo.abs() / 1.5 + 1e-6).all()
        assert torch.equal(actual.sign(), grpo.sign())


def test_without_alpha_or_entropy_it_is_grpo_bit_for_bit(batch):
    for seed in range(20):
        random = cases.random_case(seed).batch(Needs(entropy=True))
        actual, expected = (
            algorithm.assign_credit(random, 0) for algorithm in (EntropyBonus(alpha=0.0), GRPO())
        )
        assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))
    sure = EntropyBonus().assign_credit(batch, 0).advantages[[0, 3]]
    assert torch.equal(sure, GRPO().assign_credit(batch, 0).advantages[[0, 3]])


@pytest.mark.parametrize(("field", "value"), [("alpha", -0.1), ("kappa", 1.0), ("kappa", 0.0)])
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} .*{value}"):
        EntropyBonus(**{field: value})
