import math
import statistics

import pytest
import torch

from megasd.losses.config import MismatchConfig
from megasd.losses.credit import group_advantages, one_path, overlong_penalty, per_token
from megasd.losses.mismatch import (
    mismatch_metrics,
    mismatch_ratio,
    mismatch_weights,
    sequence_mismatch_ratio,
)
from megasd.losses.policy_gradient import ClipRange, clipped_surrogate, reference_kl
from megasd.losses.teacher import teacher_metrics


def advantages(rewards, group_ids, scale_by_std=True):
    return group_advantages(
        torch.tensor(rewards), torch.tensor(group_ids), scale_by_std=scale_by_std
    )


def test_group_advantages_by_hand():
    # group 7 is 1, 0, 0: mean 1/3, Bessel variance (4/9 + 1/9 + 1/9) / 2 = 1/3
    std = math.sqrt(1 / 3) + 1e-6
    expected = [2 / 3 / std, 0.5 / (math.sqrt(0.5) + 1e-6), -1 / 3 / std, -1 / 3 / std]
    actual = advantages([1.0, 3.0, 0.0, 0.0, 2.0], [7, 2, 7, 7, 2])
    assert actual[:4].tolist() == pytest.approx(expected, rel=1e-6)
    assert actual[4] == -actual[1]


def test_without_scaling_only_the_mean_is_taken_off():
    actual = advantages([1.0, 0.0, 0.0, 5.0], [0, 0, 0, 1], scale_by_std=False)
    assert actual.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_equal_rewards_give_exactly_zero_and_never_noise(dtype, scale_by_std):
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1, and 1e8 + 0.1 makes the error larger than the 1e-6
    for reward in (0.1, 0.7, 1e-8, 1e8 + 0.1):
        rewards = torch.full((3,), reward, dtype=dtype)
        actual = group_advantages(rewards, torch.tensor([4] * 3), scale_by_std=scale_by_std)
        assert actual.tolist() == [0, 0, 0]


def test_a_group_of_one_learns_nothing():
    assert advantages([1.0, 0.0], [0, 1]).tolist() == [0, 0]


def test_a_rollout_s_value_is_repeated_on_its_tokens():
    values = per_token(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0, 0]))
    assert values.tolist() == [7, 5, 5]


def test_a_token_that_cannot_change_the_update_weighs_nothing_but_stays_in_the_denominator():
    values, mask = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([True, True, False])
    assert one_path(values, mask).token_weights.tolist() == [1, 0, 0]
    assert one_path(values, mask).path.tolist() == [0, 0, -1]
    assert one_path(values, mask, zeros_count=True).token_weights.tolist() == [1, 1, 0]


def test_overlong_penalty_is_linear_over_the_buffer():
    lengths = torch.tensor([0, 60, 70, 90, 100, 120])
    penalty = overlong_penalty(lengths, buffer_tokens=40.0, max_response_tokens=100)
    assert penalty.tolist() == [0, 0, -0.25, -0.75, -1, -1]


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "is_clipped"),
    [
        (1.1, 2.0, 2.2, 0),  # inside the range: rho a
        (1.5, 2.0, 2.56, 1),  # a good token is not pushed beyond 1 + high
        (0.5, 2.0, 1.0, 0),  # but always back into the range
        (0.5, -2.0, -1.6, 1),  # a bad token is not pushed below 1 - low
        (2.5, -2.0, -5.0, 0),
        (4.0, -2.0, -8.0, 0),  # no bound without dual clip
        (4.0, 0.0, 0.0, 0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, surrogate, is_clipped):
    old = torch.tensor([-1.0])
    logprobs = (old + math.log(ratio)).requires_grad_()
    loss, metrics = clipped_surrogate(
        logprobs, old, torch.tensor([advantage]), clip=ClipRange(low=0.2, high=0.28)
    )
    assert loss.item() == pytest.approx(-surrogate, rel=1e-6)
    assert metrics["importance_ratio"].item() == pytest.approx(ratio, rel=1e-6)
    assert metrics["clip_fraction"].item() == is_clipped
    expected_kl = ratio - 1 - math.log(ratio)
    assert metrics["kl_old_to_current"].item() == pytest.approx(expected_kl, rel=1e-4)
    loss.sum().backward()
    assert logprobs.grad is not None
    gradient = 0 if is_clipped else -ratio * advantage
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-6)


def test_dual_clip_bounds_the_loss_of_a_bad_token_only():
    logprobs = torch.tensor([4.0, 2.5, 4.0]).log().requires_grad_()
    loss, metrics = clipped_surrogate(
        logprobs, torch.zeros(3), torch.tensor([-2.0, -2.0, 2.0]), clip=ClipRange(dual=3.0)
    )
    assert loss.tolist() == pytest.approx([6.0, 5.0, -2.56])
    assert metrics["clip_fraction"].tolist() == [1, 0, 1]
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0, 5, 0])


def test_on_the_first_step_the_gradient_is_minus_the_advantage():
    logprobs = torch.tensor([-1.0, -2.0]).requires_grad_()
    values = torch.tensor([0.5, -1.5])
    clipped_surrogate(logprobs, logprobs.detach(), values, clip=ClipRange()).loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == (-values).tolist()


def test_a_ratio_never_overflows():
    loss, _ = clipped_surrogate(
        torch.tensor([0.0]), torch.tensor([-500.0]), torch.tensor([-1.0]), clip=ClipRange()
    )
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("low", -0.1), ("low", 1.5), ("high", -1.0), ("dual", 1.0)]
)
def test_an_impossible_clip_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.clip\.{field} .*{value}"):
        ClipRange(**{field: value})


def test_mismatch_weights_are_truncated_above_only():
    old = torch.tensor([-1.0, -1.0, -1.0, -500.0, 0.0])
    rollout = torch.tensor([-1.0, -1.5, -3.0, 0.0, -500.0])
    expected = [1.0, math.exp(0.5), 2.0, math.exp(-20), 2.0]
    weights, stays = mismatch_weights(mismatch_ratio(old, rollout), MismatchConfig(clip=2.0))
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert stays.all()


def test_a_sequence_s_ratio_is_the_product_over_its_response_tokens():
    old = torch.tensor([-1.0, -0.5, -9.0, -1.0, -50.0])
    rollout = torch.tensor([-1.25, -0.25, 0.0, -2.0, 0.0])
    mask = torch.tensor([True, True, False, True, True])
    ids = torch.tensor([0, 0, 0, 2, 1])
    ratio = sequence_mismatch_ratio(old, rollout, mask, ids, num_rollouts=3)
    expected = [1.0, 1.0, 1.0, math.e, math.exp(-20)]
    assert ratio.tolist() == pytest.approx(expected, rel=1e-6)


def test_what_lies_outside_the_bounds_is_rejected_before_it_is_truncated():
    ratio = torch.tensor([0.49, 0.5, 1.0, 3.0, 3.01])
    weights, stays = mismatch_weights(ratio, MismatchConfig(clip=2.0, reject=(0.5, 3.0)))
    assert weights.tolist() == pytest.approx([0.49, 0.5, 1.0, 2.0, 2.0])
    assert stays.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)])
def test_reference_kl_estimates_by_hand(estimator, expected):
    logprobs = torch.tensor([-1.0], requires_grad=True)
    estimate = reference_kl(logprobs, torch.tensor([-1.5]), estimator=estimator)
    assert estimate.item() == pytest.approx(expected, abs=1e-6)
    estimate.sum().backward()
    slope = {"k1": 1.0, "k2": 0.5, "k3": 1 - math.exp(-0.5)}[estimator]  # by the log-prob
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-6)


def test_mismatch_metrics_by_hand():
    # x = old - rollout = 0.05, -0.2, 0.5, 0; the masked token would dominate everything
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    rollout = torch.tensor([-1.05, -0.8, -1.5, -1.0, -9.0])
    mask = torch.tensor([True, True, True, True, False])
    gaps = [0.05, -0.2, 0.5, 0.0]
    ratios = [math.exp(gap) for gap in gaps]
    actual = mismatch_metrics(old, rollout, mask)
    assert actual == pytest.approx(
        {
            "abs_mean": 0.1875,
            "abs_p99": 0.2 + 0.97 * 0.3,  # rank 0.99 x 3 = 2.97 of 0, 0.05, 0.2, 0.5
            "share_above_0.1": 0.5,
            "kl_rollout_to_old": statistics.mean(
                r - 1 - g for r, g in zip(ratios, gaps, strict=True)
            ),
            "effective_sample_size": sum(ratios) ** 2 / sum(r * r for r in ratios) / 4,
        },
        rel=1e-6,
    )


def test_an_engine_that_agrees_has_no_mismatch():
    old = torch.tensor([-1.0, -2.0])
    actual = mismatch_metrics(old, old, torch.ones(2, dtype=torch.bool))
    assert actual.pop("effective_sample_size") == 1
    assert set(actual.values()) == {0}


def test_metrics_of_no_token_are_left_out():
    nothing = torch.zeros(2, dtype=torch.bool)
    assert mismatch_metrics(torch.zeros(2), torch.zeros(2), nothing) == {}
    assert teacher_metrics(torch.zeros(2), nothing) == {}


def test_a_batch_may_hold_more_tokens_than_torch_quantile_takes():
    size = 2**24 + 1
    actual = teacher_metrics(torch.ones(size), torch.ones(size, dtype=torch.bool))
    assert actual["gap_p95"] == 1


def test_teacher_metrics_by_hand():
    gap = torch.tensor([1.0, -3.0, 0.5, 0.0, 7.0])
    is_scored = torch.tensor([True, True, True, True, False])
    assert teacher_metrics(gap, is_scored) == pytest.approx(
        {
            "gap_mean": 1.125,
            "gap_p95": 1 + 0.85 * 2,  # rank 0.95 x 3 = 2.85 of 0, 0.5, 1, 3
            "gap_max": 3,
            "reverse_kl": 0.375,  # the teacher is less sure of what the student said
        }
    )


def test_reverse_kl_of_a_known_pair_is_what_sampled_tokens_estimate():
    student, teacher = [0.7, 0.2, 0.1], [0.1, 0.6, 0.3]
    exact = sum(s * math.log(s / t) for s, t in zip(student, teacher, strict=True))
    # 10 tokens in the student's own proportions
    tokens = [0] * 7 + [1] * 2 + [2]
    gap = torch.tensor([math.log(teacher[token] / student[token]) for token in tokens])
    actual = teacher_metrics(gap, torch.ones(10, dtype=torch.bool))
    assert actual["reverse_kl"] == pytest.approx(exact, rel=1e-6)
