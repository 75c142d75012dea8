import math
import subprocess
import sys

import pytest
import torch

from megasd.algorithms import load_algorithm
from megasd.algorithms.grpo import GRPO
from megasd.losses.policy_gradient import ClipRange
from megasd.losses.reduce import Reduction
from megasd.types import ResponseBatch
from tests.unit import cases, reference
from tests.unit.cases import FakeStudent

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two
REDUCTIONS: tuple[Reduction, ...] = ("token_mean", "sequence_mean", "constant")


@pytest.fixture
def batch() -> ResponseBatch:
    """Two groups of two: one right, one wrong; both right. The first response has a hole."""
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        is_correct=torch.tensor([True, False, True, True]),
        group_ids=torch.tensor([5, 5, 6, 6]),
        minibatch_ids=torch.zeros(4, dtype=torch.long),
        rollout_ids=torch.tensor([0, 0, 0, 1, 2, 3]),
        response_mask=torch.tensor([True, False, True, True, True, True]),
        max_response_tokens=4,
        old_logprobs=logprobs,
    )


def test_credit_by_hand(batch):
    credit = GRPO().assign_credit(batch, 0)
    assert credit.advantages.tolist() == pytest.approx([A, A, A, -A, 0, 0], rel=1e-6)
    assert credit.path.tolist() == [0, -1, 0, 0, 0, 0]
    # the group that agrees is in the denominators, but its passes need not be run
    assert credit.token_weights.tolist() == [1, 0, 1, 1, 0, 0]


def test_a_teacher_reads_only_where_a_reference_is_asked_for():
    assert GRPO().needs.teachers == ()
    assert GRPO(kl_coef=0.1).needs.teachers == ("reference",)


def test_loss_by_hand(batch):
    algorithm = GRPO()
    credit = algorithm.assign_credit(batch, 0)
    student = FakeStudent(torch.tensor([1.5, 1.0, 1.0, 0.5, 1.0, 1.0]).log() - 1)
    loss, metrics = algorithm.token_loss(student, batch, credit)
    assert loss.tolist() == pytest.approx([-1.28 * A, -A, -A, 0.8 * A, 0, 0], rel=1e-5)
    assert metrics["clip_fraction"].tolist() == [1, 0, 0, 1, 0, 0]
    assert "entropy" not in metrics


def test_the_entropy_bonus_also_teaches_where_rewards_agree(batch):
    algorithm = GRPO(entropy_coef=0.1)
    credit = algorithm.assign_credit(batch, 0)
    assert credit.token_weights.tolist() == [1, 0, 1, 1, 1, 1]
    entropy = torch.arange(6.0).requires_grad_()
    student = FakeStudent(batch.old_logprobs, entropy)
    loss, metrics = algorithm.token_loss(student, batch, credit)
    expected = [-A, -A - 0.1, -A - 0.2, A - 0.3, -0.4, -0.5]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics["entropy"].tolist() == [0, 1, 2, 3, 4, 5]
    loss.sum().backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.1] * 6)


def test_a_long_response_is_punished_before_the_group_is_compared(batch):
    # max 4 tokens, buffer 3: 2 tokens (the hole is none) cost 1/3, one token costs nothing
    credit = GRPO(overlong_buffer=0.75, scale_by_std=False).assign_credit(batch, 0)
    assert credit.advantages.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1 / 3, 0, 0])


def test_dynamic_sampling_keeps_groups_that_disagree_until_the_refills_are_spent(batch):
    rewards, group_ids = batch.rewards, batch.group_ids
    algorithm = GRPO(dynamic_sampling=True, max_refills=2)
    assert algorithm.rows_to_keep(rewards, group_ids, 0).tolist() == [True, True, False, False]
    assert algorithm.rows_to_keep(rewards, group_ids, 1).tolist() == [True, True, False, False]
    assert algorithm.rows_to_keep(rewards, group_ids, 2).all()
    assert GRPO().rows_to_keep(rewards, group_ids, 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("entropy_coef", -0.1),
        ("entropy_coef", math.nan),
        ("overlong_buffer", 1.5),
        ("overlong_buffer", -0.1),
        ("max_refills", -1),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} .*{value}"):
        GRPO(**{field: value})


def test_presets_are_names_for_grpo_with_other_values():
    dapo = load_algorithm("dapo")
    assert dapo.build() == GRPO(reduction="token_mean", dynamic_sampling=True, overlong_buffer=0.2)
    dr_grpo = load_algorithm("dr_grpo")
    assert dr_grpo.build() == GRPO(reduction="constant", scale_by_std=False)


def test_a_misspelt_name_gets_the_nearest_one_back():
    with pytest.raises(ValueError, match=r"^algorithm\.name is 'rlds', not one of .*'rlsd'"):
        load_algorithm("rlds")


def test_the_registry_is_read_without_torch():
    code = "import sys, megasd.algorithms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def plain_credit(case: cases.Case, algorithm: GRPO) -> tuple[list[float], list[bool]]:
    """Advantage of every token, and whether it is run."""
    rewards = case.rewards
    if algorithm.overlong_buffer:
        rewards = [
            reward + reference.overlong_penalty(length, buffer_tokens=6, max_response_tokens=12)
            for reward, length in zip(rewards, case.lengths, strict=True)
        ]
    per_rollout = reference.group_advantages(
        rewards, case.group_ids, scale_by_std=algorithm.scale_by_std
    )
    advantages = [per_rollout[rollout] for rollout in case.rollout_ids]
    is_run = [
        used and (advantage != 0 or algorithm.entropy_coef > 0)
        for used, advantage in zip(case.response_mask, advantages, strict=True)
    ]
    return advantages, is_run


def test_two_hundred_random_batches_equal_the_plain_reference():
    for seed in range(200):
        algorithm = GRPO(
            clip=ClipRange(dual=3.0 if seed % 7 == 0 else None),
            scale_by_std=seed % 2 == 0,
            reduction=REDUCTIONS[seed % 3],
            entropy_coef=0.01 if seed % 3 == 0 else 0.0,
            overlong_buffer=0.5 if seed % 5 == 0 else 0.0,  # 6 of 12 tokens
        )
        case = cases.random_case(seed)
        advantages, is_run = plain_credit(case, algorithm)
        shares = reference.reduction_weights(algorithm.reduction, case.path, case.rollout_ids, 12)
        terms, gradients = [], []
        for token, advantage in enumerate(advantages):
            loss, slope = reference.surrogate(
                case.logprobs[token],
                case.old_logprobs[token],
                advantage,
                low=0.2,
                high=0.28,
                dual=algorithm.clip.dual,
            )
            share = shares[token] * is_run[token]
            terms.append((loss - algorithm.entropy_coef * case.entropy[token]) * share)
            gradients.append(slope * share)

        batch = case.batch()
        credit = algorithm.assign_credit(batch, seed)
        logprobs = torch.tensor(case.logprobs).requires_grad_()
        student = FakeStudent(logprobs, torch.tensor(case.entropy))
        losses = algorithm.token_loss(student, batch, credit).loss
        actual = losses * cases.update_weights(algorithm.reduction, batch, credit)
        actual.sum().backward()
        assert logprobs.grad is not None
        assert credit.path.tolist() == case.path
        assert credit.token_weights.tolist() == is_run
        assert credit.advantages.tolist() == pytest.approx(advantages, rel=1e-5, abs=0)
        assert actual.tolist() == pytest.approx(terms, rel=1e-5, abs=1e-9)
        assert logprobs.grad.tolist() == pytest.approx(gradients, rel=1e-5, abs=0)
