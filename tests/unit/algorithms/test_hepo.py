import dataclasses
import math

import pytest
import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.grpo import GRPO
from megasd.algorithms.hepo import HEPO
from megasd.types import ResponseBatch
from tests.unit import cases

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two


def batch_of(entropy: list[float], minibatch_ids: list[int]) -> ResponseBatch:
    """Two groups of two, one right and one wrong rollout each; as many tokens for each."""
    length = len(entropy) // 4
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        is_correct=torch.tensor([True, False, True, False]),
        group_ids=torch.tensor([0, 0, 1, 1]),
        minibatch_ids=torch.tensor(minibatch_ids),
        rollout_ids=torch.arange(4).repeat_interleave(length),
        response_mask=torch.ones(4 * length, dtype=torch.bool),
        max_response_tokens=length,
        entropy=torch.tensor(entropy),
    )


def selected(credit) -> list[int]:
    return (credit.path == 0).nonzero()[:, 0].tolist()


def test_credit_by_hand():
    batch = batch_of([0.1, 2.0, 0.2, 0.3, 3.0, 0.4, 0.5, 1.0], [0, 0, 0, 0])
    credit = HEPO(token_share=0.25).assign_credit(batch, 0)
    assert credit.path.tolist() == [-1, 0, -1, -1, 0, -1, -1, -1]
    assert credit.advantages[[1, 4]].tolist() == pytest.approx([A, A], rel=1e-6)
    assert credit.metrics == {"selected": 0.25}


def test_the_selected_tokens_are_the_denominator():
    batch = batch_of([0.1, 2.0, 0.2, 0.3, 3.0, 0.4, 0.5, 1.0], [0, 0, 0, 0])
    weights = cases.update_weights(
        "token_mean", batch, HEPO(token_share=0.25).assign_credit(batch, 0)
    )
    assert weights.tolist() == [0, 0.5, 0, 0, 0.5, 0, 0, 0]


def test_of_equal_entropies_the_first_tokens_are_taken():
    batch = batch_of([1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 0.0, 0.0], [0, 0, 0, 0])
    assert selected(HEPO(token_share=0.5).assign_credit(batch, 0)) == [0, 1, 2, 4]


def test_each_mini_batch_has_its_own_share():
    entropy = [5.0, 6.0, 7.0, 8.0, 0.1, 0.4, 0.3, 0.2]
    assert selected(HEPO(token_share=0.5).assign_credit(batch_of(entropy, [0, 0, 1, 1]), 0)) == [
        *(2, 3),
        *(5, 6),
    ]
    assert selected(HEPO(token_share=0.5).assign_credit(batch_of(entropy, [0] * 4), 0)) == [
        0,
        1,
        2,
        3,
    ]


def test_one_token_is_taken_of_the_shortest_batch_and_masked_ones_do_not_count():
    batch = batch_of([1.0, 9.0, 2.0, 3.0], [0, 0, 0, 0])
    batch = dataclasses.replace(batch, response_mask=torch.tensor([True, False, True, False]))
    assert selected(HEPO(token_share=0.01).assign_credit(batch, 0)) == [2]
    nothing = dataclasses.replace(batch, response_mask=torch.zeros(4, dtype=torch.bool))
    assert selected(HEPO().assign_credit(nothing, 0)) == []


@pytest.mark.parametrize(
    ("share", "tokens", "expected"),
    [(0.2, 4, 1), (0.2, 8, 2), (0.2, 20, 4), (0.2, 24, 5), (0.07, 100, 7)],  # 0.07 x 100 > 7
)
def test_the_share_is_rounded_up(share, tokens, expected):
    batch = batch_of(torch.rand(tokens).tolist(), [0, 0, 0, 0])
    assert len(selected(HEPO(token_share=share).assign_credit(batch, 0))) == expected


def test_the_whole_share_is_grpo_bit_for_bit():
    for seed in range(20):
        batch = cases.random_case(seed).batch(Needs(entropy=True))
        actual, expected = (
            algorithm.assign_credit(batch, 0) for algorithm in (HEPO(token_share=1.0), GRPO())
        )
        assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_a_hundred_random_batches_equal_a_plain_ranking():
    for seed in range(100):
        case, share = cases.random_case(seed), [0.2, 0.5, 0.05][seed % 3]
        expected = []
        for minibatch in set(case.minibatch_ids):
            tokens = [
                token
                for token, rollout in enumerate(case.rollout_ids)
                if case.response_mask[token] and case.minibatch_ids[rollout] == minibatch
            ]
            ranked = sorted(tokens, key=lambda token: (-case.entropy[token], token))
            expected += ranked[: max(1, math.ceil(share * len(tokens) - 1e-9))]
        credit = HEPO(token_share=share).assign_credit(case.batch(Needs(entropy=True)), 0)
        assert selected(credit) == sorted(expected)


@pytest.mark.parametrize("share", [0.0, 1.1, math.nan])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=rf"^algorithm\.token_share .*{share}"):
        HEPO(token_share=share)
