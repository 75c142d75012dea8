import dataclasses
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from megasd.algorithms.antisd import AntiSD
from megasd.algorithms.grpo import GRPO
from megasd.types import Credit, ResponseBatch, TeacherScores
from tests.unit import cases

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two
ON = {"reference_entropy": torch.tensor(1.0), "is_on": torch.tensor(True)}


def batch_of(
    gaps: Sequence[float] = (0.0,) * 5,
    entropies: Sequence[float] = (1.0,) * 5,
    *,
    has_context: Sequence[bool] = (True, True, True),
    response_mask: Sequence[bool] = (True,) * 5,
    memory: Mapping[str, Tensor] = ON,
) -> ResponseBatch:
    """One right and one wrong rollout of a group, two tokens each, then a lone one of one."""
    old_logprobs, rollout_ids = torch.full((5,), -3.0), torch.tensor([0, 0, 1, 1, 2])
    read = torch.tensor(has_context)[rollout_ids]
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        is_correct=torch.tensor([True, False, True]),
        group_ids=torch.tensor([5, 5, 6]),
        minibatch_ids=torch.zeros(3, dtype=torch.long),
        rollout_ids=rollout_ids,
        response_mask=torch.tensor(response_mask),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            "teacher": TeacherScores(
                has_context=torch.tensor(has_context),
                logprobs=torch.where(read, old_logprobs + torch.tensor(gaps), old_logprobs),
                entropy=torch.where(read, torch.tensor(entropies), 0.0),
            )
        }
        if any(has_context)
        else {},
        memory=memory,
    )


def gates(algorithm: AntiSD, medians: Sequence[float | None]) -> list[float]:
    """The gate at each step; None is a batch without any context."""
    memory: Mapping[str, Tensor] = {}
    found = []
    for step, median in enumerate(medians):
        batch = (
            batch_of(has_context=(False, False, False), memory=memory)
            if median is None
            else batch_of(entropies=[median] * 5, memory=memory)
        )
        credit = algorithm.assign_credit(batch, step)
        assert credit.metrics["lam"] == algorithm.lam * credit.metrics["gate"]
        found.append(credit.metrics["gate"])
        memory = credit.memory
    return found


def assert_same(actual: Credit, expected: Credit) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


def test_credit_by_hand():
    credit = AntiSD(lam=0.5).assign_credit(batch_of([1.0, -2.0, 0.0, 1.0, 3.0]), 5)
    push = [0.25 * (math.log1p(math.exp(d)) - math.log(2)) for d in (1, -2, 0, 1, 3)]
    # pushed off what the teacher likes, in a bad rollout and without any advantage too
    expected = [a - p for a, p in zip([A, A, -A, -A, 0], push, strict=True)]
    assert credit.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert credit.token_weights.tolist() == [1] * 5
    assert credit.metrics["lam"] == 0.5


@pytest.mark.parametrize("gap", [50.0, 200.0])
def test_huge_gaps_push_in_proportion_or_hold_up_by_a_constant(gap):
    advantages = AntiSD(lam=0.5).assign_credit(batch_of([gap, -gap, -gap, gap, -gap]), 5).advantages
    push, hold = 0.25 * (gap - math.log(2)), 0.25 * math.log(2)
    expected = [A - push, A + hold, -A + hold, -A - push, hold]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_gate_opens_after_the_warm_up_and_closes_until_the_entropy_is_back():
    medians = [1.0] * 5 + [0.94, 0.93, 0.92, 0.94, 0.999, 1.0, 0.95, 0.5, None, None, 1.1]
    expected = [0] * 5 + [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert gates(AntiSD(), medians) == expected
    assert gates(AntiSD(warmup_steps=1), [1.0, None, 0.5, 2.0]) == [0, 1, 0, 1]


def test_a_warm_up_without_any_context_goes_on_until_one_comes():
    assert gates(AntiSD(warmup_steps=2), [None, None, None, 1.0, 0.95, 0.5]) == [0] * 4 + [1, 0]


def test_the_reference_is_the_median_over_all_the_tokens_of_the_warm_up():
    batches = [[5.0, 1.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 2.5, 9.0]]
    has_context = [(True, False, False), (True, True, False)]
    memory: Mapping[str, Tensor] = {}
    for step in range(2):
        batch = batch_of(entropies=batches[step], has_context=has_context[step], memory=memory)
        memory = AntiSD(warmup_steps=2).assign_credit(batch, step).memory
    # of 5, 1 | 1, 2, 3, 2.5: no token without context, the mean of the middle two
    assert memory["reference_entropy"].item() == 2.25
    assert set(memory) == {"reference_entropy", "is_on"}


def test_a_warm_up_keeps_counts_of_values_and_goes_on_from_the_tokens_of_an_old_checkpoint():
    two = batch_of(entropies=[1.0, 1.0, 2.0, 3.0, 3.0], memory={})
    kept = AntiSD(warmup_steps=2).assign_credit(two, 0).memory
    assert kept["warmup_entropies"].tolist() == [1, 2, 3]
    assert kept["warmup_counts"].tolist() == [2, 1, 2]
    old = {"warmup_entropies": torch.tensor([3.0, 1.0, 3.0, 2.0, 1.0])}
    for memory in (kept, old):
        after = AntiSD(warmup_steps=2).assign_credit(batch_of(memory=memory), 1).memory
        assert after["reference_entropy"].item() == 1.0, "of 1 x 7, 2, 3, 3"


def test_masked_tokens_have_no_say_in_the_gate():
    entropies, mask = [1.0, 0.1, 0.1, 1.0, 0.1], (True, False, False, True, False)
    credit = AntiSD().assign_credit(batch_of(entropies=entropies, response_mask=mask), 5)
    assert credit.metrics["gate"] == 1
    assert credit.metrics["teacher_entropy"] == 1


def test_off_without_context_or_lam_it_is_grpo_bit_for_bit():
    for seed in range(20):
        batch = cases.random_case(seed).batch(AntiSD().needs)
        expected = GRPO().assign_credit(batch, 0)
        assert_same(AntiSD().assign_credit(batch, 0), expected)
        on = dataclasses.replace(batch, memory=ON)
        assert_same(AntiSD(lam=0.0).assign_credit(on, 9), expected)
        unread = dataclasses.replace(on, teachers={})
        assert_same(AntiSD().assign_credit(unread, 9), expected)
        high = {**ON, "reference_entropy": torch.tensor(9.0)}
        assert_same(AntiSD().assign_credit(dataclasses.replace(on, memory=high), 9), expected)


def test_tokens_of_a_rollout_without_context_keep_their_advantage():
    batch = batch_of([1.0] * 5, has_context=(True, False, False))
    advantages = AntiSD().assign_credit(batch, 5).advantages
    expected = GRPO().assign_credit(batch, 0).advantages
    assert torch.equal(advantages[2:], expected[2:])
    assert (advantages[:2] < expected[:2]).all()


def test_the_teacher_reads_every_rollout_also_while_the_term_is_off():
    batch = batch_of()
    assert AntiSD().rows_to_score(batch, {}, 0).all()
    assert not AntiSD(lam=0.0).rows_to_score(batch, {}, 0).any()
    assert AntiSD().needs.teacher_entropy


@pytest.mark.parametrize(
    ("field", "value"), [("lam", -0.5), ("warmup_steps", 0), ("off_below", 2.0)]
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} .*{value}"):
        AntiSD(**{field: value})


def test_every_default_says_where_it_stands():
    named = {f.name for f in dataclasses.fields(AntiSD)} | {
        f"{section}.{key}" for section, keys in AntiSD.section_defaults.items() for key in keys
    }
    assert set(AntiSD.sources) == named
