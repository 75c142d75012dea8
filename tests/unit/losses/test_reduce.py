import random

import pytest
import torch

from megasd.algorithms.grpo import GRPO
from megasd.algorithms.rlsd import RLSD
from megasd.algorithms.sft import SFT
from megasd.losses.reduce import reduction_weights
from tests.unit import cases, reference
from tests.unit.cases import FakeStudent

REDUCTIONS = ["token_mean", "sequence_mean", "constant"]


def weights(reduction, path, rollout_ids, num_rollouts=4):
    return reduction_weights(
        reduction,
        torch.tensor(path, dtype=torch.long),
        torch.tensor(rollout_ids, dtype=torch.long),
        num_rollouts=num_rollouts,
        max_response_tokens=10,
    )


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # rollout 0 has 3 tokens, one of them a hole; rollout 1 has only a hole; rollout 3 has 2
        ("token_mean", [1 / 4, 0, 1 / 4, 0, 1 / 4, 1 / 4]),
        ("sequence_mean", [1 / 4, 0, 1 / 4, 0, 1 / 4, 1 / 4]),
        ("constant", [1 / 20, 0, 1 / 20, 0, 1 / 20, 1 / 20]),
    ],
)
def test_rollouts_without_a_token_are_in_no_denominator(reduction, expected):
    actual = weights(reduction, [0, -1, 0, -1, 0, 0], [0, 0, 0, 1, 3, 3])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=0)


def test_sequence_mean_gives_short_and_long_rollouts_the_same_say():
    expected = torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    torch.testing.assert_close(weights("sequence_mean", [0] * 4, [2, 0, 0, 0]), expected)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", [1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3, 0]),
        ("sequence_mean", [1 / 4, 1 / 2, 1 / 4, 1 / 2, 1 / 2, 0]),
        ("constant", [1 / 20, 1 / 20, 1 / 20, 1 / 20, 1 / 20, 0]),
    ],
)
def test_every_path_has_its_own_denominators(reduction, expected):
    # path 0: two tokens of rollout 0, one of rollout 2; path 1: one token of rollouts 0 and 2
    actual = weights(reduction, [0, 1, 0, 1, 0, -1], [0, 0, 0, 2, 2, 1])
    torch.testing.assert_close(actual, torch.tensor(expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_a_token_to_train_on_weighs_nothing(reduction):
    assert weights(reduction, [], []).tolist() == []
    assert weights(reduction, [-1, -1], [0, 1]).tolist() == [0, 0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_equal_the_reference_and_means_sum_to_one_per_path(reduction):
    for seed in range(50):
        rng = random.Random(seed)
        size = rng.randint(1, 40)
        path = [rng.choice([-1, 0, 0, 2]) for _ in range(size)]
        rollout_ids = [rng.randrange(4) for _ in range(size)]
        actual = weights(reduction, path, rollout_ids)
        expected = reference.reduction_weights(reduction, path, rollout_ids, 10)
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-7, atol=0)
        for number in {p for p in path if p >= 0} if reduction != "constant" else ():
            total = actual.double()[torch.tensor(path) == number].sum().item()
            assert total == pytest.approx(1, abs=1e-6)


def accumulated(algorithm, batch, credit, token_weights, cuts, seed):
    """Loss and gradient of a linear student, summed over the micro-batches `cuts`."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(token_weights), 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (len(token_weights), 1), generator=generator)
    head = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    total = 0.0
    for cut in cuts:
        logprobs = (features[cut] @ head).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        student = FakeStudent(logprobs.gather(-1, targets[cut])[:, 0], entropy)
        losses = algorithm.token_loss(student, batch.at(cut), credit.at(cut)).loss
        loss = (losses * token_weights[cut]).sum()
        loss.backward()
        total += loss.item()
    return total, head.grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "make",
    [
        lambda reduction: GRPO(reduction=reduction, entropy_coef=0.01, overlong_buffer=0.5),
        lambda reduction: RLSD(reduction=reduction),
        lambda reduction: SFT(reduction=reduction),
    ],
    ids=["grpo", "rlsd", "sft"],
)
def test_loss_and_gradient_do_not_depend_on_how_the_batch_is_cut(make, reduction):
    algorithm = make(reduction)
    for seed in range(5):
        batch = cases.random_case(seed).batch()
        credit = algorithm.assign_credit(batch, 0)
        update = (
            algorithm,
            batch,
            credit,
            cases.update_weights(algorithm.reduction, batch, credit),
        )
        num_tokens = len(batch.rollout_ids)
        order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
        whole, whole_gradient = accumulated(*update, [torch.arange(num_tokens)], seed)
        cut, cut_gradient = accumulated(*update, order.tensor_split(min(num_tokens, 4)), seed)
        assert cut == pytest.approx(whole, rel=1e-9, abs=1e-12)
        torch.testing.assert_close(cut_gradient, whole_gradient, rtol=1e-9, atol=1e-12)
