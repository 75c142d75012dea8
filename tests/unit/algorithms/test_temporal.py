import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from omegaconf import OmegaConf

from megasd.algorithms.grpo import GRPO
from megasd.algorithms.rlsd import RLSD
from megasd.algorithms.temporal import Temporal
from megasd.types import Credit, ResponseBatch
from tests.unit import cases
from tests.unit.cases import Case, FakeStudent

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two
SCHEDULES = ["tail_first", "forking", "entropy_bonus"]


def batch_of(
    lengths: Sequence[int],
    *,
    entropy: Sequence[float] | None = None,
    response_mask: Sequence[bool] | None = None,
    minibatch_ids: Sequence[int] | None = None,
) -> ResponseBatch:
    """Right and wrong rollouts of groups of two, of these lengths."""
    num_tokens = sum(lengths)
    rewards = torch.tensor([1.0, 0.0] * (len(lengths) // 2))
    return ResponseBatch(
        rewards=rewards,
        is_correct=rewards == 1,
        group_ids=torch.arange(len(lengths)) // 2,
        minibatch_ids=torch.tensor(minibatch_ids or [0] * len(lengths)),
        rollout_ids=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        response_mask=torch.tensor(response_mask or [True] * num_tokens),
        max_response_tokens=16,
        old_logprobs=torch.full((num_tokens,), -1.0),
        entropy=torch.tensor(entropy or [0.0] * num_tokens),
    )


def case_batch(case: Case, algorithm: Temporal) -> ResponseBatch:
    needs = dataclasses.replace(algorithm.needs, teachers=("teacher", "wrong[0]", "wrong[1]"))
    return case.batch(needs)


def assert_same(actual: Credit, expected: Credit) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_only_the_tail_of_each_rollout_learns_and_it_grows():
    batch, algorithm = batch_of([10, 1, 4, 3]), Temporal(steps=10, start=0.8)
    learning = {
        step: [
            int((algorithm.assign_credit(batch, step).path[batch.rollout_ids == rollout]).sum())
            for rollout in range(4)
        ]
        for step in (0, 5, 9, 10)
    }
    # of 10, 1, 4, 3 tokens the first 8, 0, 3, 2 wait; then 4, 0, 1, 1; then none
    assert learning == {0: [-8, 0, -3, -2], 5: [-4, 0, -1, -1], 9: [0] * 4, 10: [0] * 4}
    first = algorithm.assign_credit(batch, 0)
    assert first.path[:10].tolist() == [-1] * 8 + [0] * 2
    assert first.metrics["selected"] == 5 / 18
    weights = cases.update_weights("token_mean", batch, first)
    assert weights[first.path == 0].tolist() == pytest.approx([1 / 5] * 5)


def test_positions_count_response_tokens_only():
    mask = [False, True, False, True, True, True, True, True]
    batch = batch_of([6, 2], response_mask=mask)
    credit = Temporal(start=0.5).assign_credit(batch, 0)
    assert credit.path.tolist() == [-1, -1, -1, -1, 0, 0, -1, 0]


def test_only_the_forking_tokens_of_each_minibatch_learn():
    entropy = [0.1, 0.9, 0.5, 0.5, 0.2, 3.0, 2.0, 3.0, 3.0, 9.0]
    batch = batch_of(
        [3, 2, 4, 1],
        entropy=entropy,
        minibatch_ids=[0, 0, 1, 1],
        response_mask=[True] * 9 + [False],
    )
    algorithm = Temporal(schedule="forking", share=0.4, steps=10)
    # 2 of 5 and 2 of 4, of equals the first; then 0.7: 4 and 3
    assert algorithm.assign_credit(batch, 0).path.tolist() == [-1, 0, 0, -1, -1, 0, -1, 0, -1, -1]
    assert algorithm.assign_credit(batch, 5).path.tolist() == [-1, 0, 0, 0, 0, 0, -1, 0, 0, -1]
    assert algorithm.assign_credit(batch, 10).path.tolist() == [0] * 9 + [-1]


def test_the_entropy_bonus_by_hand():
    batch = batch_of([2, 2], entropy=[0.5, 9.0, 0.5, 9.0])
    algorithm = Temporal(schedule="entropy_bonus", steps=4, alpha=0.4, kappa=2.0)
    at_start, halfway = (algorithm.assign_credit(batch, step).advantages for step in (0, 2))
    assert at_start.tolist() == pytest.approx([A + 0.2, 1.5 * A, -A + 0.2, -0.5 * A], rel=1e-6)
    assert halfway.tolist() == pytest.approx([A + 0.1, 1.5 * A, -A + 0.1, -0.5 * A], rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("base", ["grpo", "dapo", "dr_grpo", "rlsd"])
def test_from_the_last_step_on_it_is_the_base_bit_for_bit(base, schedule):
    algorithm = Temporal(base=base, schedule=schedule, steps=7)
    for seed in range(10):
        case = cases.random_case(seed)
        batch = case_batch(case, algorithm)
        for step in (7, 1000):
            actual = algorithm.assign_credit(batch, step)
            expected = algorithm.method.assign_credit(batch, step)
            assert_same(actual, expected)
            losses = [
                method.token_loss(case.student(batch), batch, expected)
                for method in (algorithm, algorithm.method)
            ]
            assert torch.equal(losses[0].loss, losses[1].loss)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fifty_random_batches_equal_the_plain_rules(schedule):
    for seed in range(50):
        case, step = cases.random_case(seed), seed % 9
        algorithm = Temporal(base="rlsd", schedule=schedule, steps=8, start=0.9, share=0.2)
        batch = case_batch(case, algorithm)
        base = algorithm.method.assign_credit(batch, step)
        actual = algorithm.assign_credit(batch, step)
        left = max(1 - Fraction(step, 8), Fraction(0))
        stays = set(range(len(case.rollout_ids)))
        bonus = [0.0] * len(case.rollout_ids)
        if schedule == "tail_first":
            for rollout in range(len(case.rewards)):
                tokens = [
                    t
                    for t, (r, m) in enumerate(
                        zip(case.rollout_ids, case.response_mask, strict=True)
                    )
                    if r == rollout and m
                ]
                stays -= set(tokens[: math.floor(Fraction(9, 10) * left * len(tokens))])
        elif schedule == "forking":
            for minibatch in set(case.minibatch_ids):
                tokens = [
                    t
                    for t, r in enumerate(case.rollout_ids)
                    if case.minibatch_ids[r] == minibatch and case.response_mask[t]
                ]
                tokens.sort(key=lambda t: (-case.entropy[t], t))
                share = 1 - Fraction(4, 5) * left
                stays -= set(tokens[math.ceil(share * len(tokens)) :])
        else:
            bonus = [
                min(0.4 * float(left) * h, abs(a) / 2)
                for h, a in zip(case.entropy, base.advantages.tolist(), strict=True)
            ]
        expected = [a + b for a, b in zip(base.advantages.tolist(), bonus, strict=True)]
        assert actual.advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert actual.path.tolist() == [
            p if t in stays else -1 for t, p in enumerate(base.path.tolist())
        ]
        assert torch.equal(actual.token_weights, base.token_weights)
        assert torch.equal(actual.advantages.sign(), base.advantages.sign())


def test_a_share_that_is_whole_but_for_rounding_is_whole():
    batch = batch_of([100, 100], entropy=[float(i) for i in range(200)])
    forking = Temporal(schedule="forking", share=0.07).assign_credit(batch, 0)
    assert int((forking.path == 0).sum()) == 14
    # 0.58 x 100 is 57.99999999999999 in floats
    tail = Temporal(start=0.58).assign_credit(batch, 0)
    assert tail.path[:100].tolist() == [-1] * 58 + [0] * 42


def test_a_rollout_always_keeps_its_last_token_and_a_minibatch_its_first_choice():
    batch = batch_of([1, 7], entropy=[0.0] * 8)
    tail = Temporal(start=0.999999999).assign_credit(batch, 0)
    assert tail.path.tolist() == [0] + [-1] * 6 + [0]
    forking = Temporal(schedule="forking", share=1e-9).assign_credit(batch, 0)
    assert forking.path.tolist() == [0] + [-1] * 7


def test_everything_else_is_the_base_s():
    options = {"mix": 0.3, "clip": {"high": 0.4}, "mix_steps": None}
    algorithm = Temporal(base="rlsd", options=options)
    base = RLSD(mix=0.3, mix_steps=None, clip=dataclasses.replace(RLSD().clip, high=0.4))
    assert algorithm.method == base
    assert algorithm.needs == base.needs
    needs = Temporal(base="rlsd", schedule="forking").needs
    assert needs == dataclasses.replace(base.needs, entropy=True)
    batch = batch_of([3, 2])
    assert algorithm.rows_to_score(batch, {}, 0).tolist() == [True, True]
    assert not Temporal(base="rlsd", options={"mix": 0}).rows_to_score(batch, {}, 0).any()
    equal = torch.tensor([1.0, 1.0])
    dropped = Temporal(base="dapo").rows_to_keep(equal, torch.tensor([0, 0]), 0)
    assert dropped.tolist() == [False, False]
    student = FakeStudent(torch.linspace(1, -3, 5))
    credit = algorithm.assign_credit(batch, 0)
    losses = [method.token_loss(student, batch, credit).loss for method in (algorithm, base)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], GRPO().token_loss(student, batch, credit).loss)


def test_the_reduction_is_the_base_s_and_changes_with_its_options():
    assert Temporal().reduction == "sequence_mean"
    assert Temporal(base="dapo").reduction == "token_mean"
    assert Temporal(options={"reduction": "constant"}).reduction == "constant"
    with pytest.raises(ValueError, match=r"^algorithm\.reduction .* algorithm\.options\.reduction"):
        Temporal(reduction="token_mean")


def test_what_is_written_to_a_config_reads_back_equal():
    algorithm = Temporal(base="dapo", options={"clip": {"low": 0.1}}, schedule="forking")
    section = OmegaConf.merge(Temporal, dataclasses.asdict(algorithm))
    assert OmegaConf.to_object(section) == algorithm


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "grppo"}, r"algorithm\.base: 'grppo'"),
        ({"base": "sft"}, r"algorithm\.base: 'sft'"),
        ({"options": {"mixx": 1}}, r"algorithm\.options\.mixx: .*grpo"),
        ({"options": {"clip": {"lo": 1}}}, r"algorithm\.options\.clip\.lo: "),
        ({"options": {"clip": 3}}, r"algorithm\.options: .*ClipRange.* 3"),
        ({"options": {"reduction": "mean"}}, r"algorithm\.options\.reduction: .*'mean'"),
        ({"base": "rlsd", "options": {"mix": "half"}}, r"algorithm\.options\.mix: .*'half'"),
        ({"base": "rlsd", "options": {"mix": 3}}, r"algorithm\.options\.mix must .*3"),
        ({"steps": 0}, r"algorithm\.steps must .*0"),
        ({"start": 1.0}, r"algorithm\.start must .*1\.0"),
        ({"share": 0.0}, r"algorithm\.share must .*0\.0"),
        ({"alpha": -1.0}, r"algorithm\.alpha must .*-1\.0"),
        ({"kappa": 1.0}, r"algorithm\.kappa must .*1\.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Temporal(**fields)


def test_every_default_says_where_it_stands():
    assert set(Temporal.sources) == {f.name for f in dataclasses.fields(Temporal)}
