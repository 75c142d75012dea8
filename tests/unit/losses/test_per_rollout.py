import math
import statistics

import numpy as np
import pytest
import torch

from megasd.losses.per_rollout import mean, mean_absolute_deviation, quantile, router
from megasd.types import ResponseBatch
from tests.unit import cases


def batch_of(rollout_ids: list[int], mask: list[bool], num_rollouts: int) -> ResponseBatch:
    per_rollout = torch.zeros(num_rollouts, dtype=torch.long)
    return ResponseBatch(
        rewards=per_rollout.float(),
        is_correct=per_rollout.bool(),
        group_ids=per_rollout,
        minibatch_ids=per_rollout,
        rollout_ids=torch.tensor(rollout_ids),
        response_mask=torch.tensor(mask),
        max_response_tokens=9,
    )


def test_by_hand():
    # rollout 0: 4, 1, 2, 9 without its masked 7; rollout 1: 5; 2: masked; 3: nothing
    batch = batch_of([0, 0, 0, 0, 0, 1, 2], [True, True, False, True, True, True, False], 4)
    values = torch.tensor([4.0, 1.0, 7.0, 2.0, 9.0, 5.0, 3.0])
    assert quantile(values, 0.5, batch).tolist() == [3, 5, 0, 0]  # of 1, 2, 4, 9: (2 + 4) / 2
    assert quantile(values, 0.2, batch).tolist() == pytest.approx([1.6, 5, 0, 0])
    assert quantile(values, 0.0, batch).tolist() == [1, 5, 0, 0]
    assert quantile(values, 1.0, batch).tolist() == [9, 5, 0, 0]
    assert mean(values, batch).tolist() == [4, 5, 0, 0]
    assert mean_absolute_deviation(values, batch).tolist() == [2.5, 0, 0, 0]


def test_router_by_hand():
    batch = batch_of([0] * 4, [True] * 4, 1)
    values = torch.tensor([0.0, 0.8, 1.8, 4.8])
    # tau = 1.3; mean 1.85, s = (1.85 + 1.05 + 0.05 + 2.95) / 4 = 1.475
    below = [1.3 / 1.475, 0.5 / 1.475, -0.5 / 1.475, -3.5 / 1.475]
    smooth, hard, linear = (
        router(values, 0.5, batch, shape=shape) for shape in ("tanh", "hard", "linear")
    )
    assert smooth.tolist() == pytest.approx([math.tanh(x) for x in below], rel=1e-5)
    assert hard.tolist() == [1, 1, -1, -1]
    assert linear.tolist() == pytest.approx([*below[:3], -1], rel=1e-5)


def test_a_single_token_and_a_constant_signal_have_no_direction():
    batch = batch_of([0, 1, 1, 1], [True] * 4, 2)
    values = torch.tensor([0.7, 0.1, 0.1, 0.1])
    assert router(values, 0.2, batch, shape="hard").tolist() == [0, 0, 0, 0]


def test_a_batch_without_response_tokens_is_no_error():
    batch = batch_of([0, 1], [False, False], 2)
    values = torch.tensor([1.0, 2.0])
    assert quantile(values, 0.5, batch).tolist() == [0, 0]
    assert mean_absolute_deviation(values, batch).tolist() == [0, 0]


def test_random_batches_equal_numpy_rollout_by_rollout():
    for seed in range(100):
        case = cases.random_case(seed)
        batch, share = case.batch(), [0.2, 0.37, 0.5, 0.9][seed % 4]
        values = torch.tensor(case.entropy)
        for rollout, length in enumerate(case.lengths):
            own = [
                value
                for value, owner, used in zip(
                    case.entropy, case.rollout_ids, case.response_mask, strict=True
                )
                if used and owner == rollout
            ] or [0.0]
            assert len(own) == max(1, length)
            center = statistics.mean(own)
            spread = statistics.mean(abs(value - center) for value in own)
            assert quantile(values, share, batch)[rollout].item() == pytest.approx(
                np.quantile(own, share)
            )
            assert quantile(values, 0.5, batch)[rollout].item() == statistics.median(own)
            assert mean(values, batch)[rollout].item() == pytest.approx(center)
            assert mean_absolute_deviation(values, batch)[rollout].item() == pytest.approx(
                spread, abs=1e-12
            )


def test_the_order_of_the_tokens_is_of_no_account():
    for seed in range(20):
        batch = cases.random_case(seed).batch()
        values = torch.randn(len(batch.rollout_ids), generator=torch.manual_seed(seed))
        shuffled = torch.randperm(len(values))
        assert torch.equal(
            quantile(values, 0.3, batch), quantile(values[shuffled], 0.3, batch.at(shuffled))
        )
