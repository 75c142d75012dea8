import dataclasses
import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from megasd.algorithms.grpo import GRPO
from megasd.algorithms.rlcsd import RLCSD
from megasd.types import ResponseBatch, TeacherScores
from tests.unit import cases, reference

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two
ALL = [True, True, True, True]


def batch_of(
    gaps: Mapping[str, Sequence[float]], contexts: Mapping[str, Sequence[bool]] | None = None
) -> ResponseBatch:
    """Two right and two wrong rollouts, two tokens each, in groups of two; gaps by role."""
    old_logprobs = torch.full((8,), -2.0)
    rollout_ids = torch.arange(4).repeat_interleave(2)
    has = {role: torch.tensor((contexts or {}).get(role, ALL)) for role in gaps}
    return ResponseBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        is_correct=torch.tensor([True, False, True, False]),
        group_ids=torch.tensor([0, 0, 1, 1]),
        minibatch_ids=torch.zeros(4, dtype=torch.long),
        rollout_ids=rollout_ids,
        response_mask=torch.ones(8, dtype=torch.bool),
        max_response_tokens=4,
        old_logprobs=old_logprobs,
        teachers={
            role: TeacherScores(
                has_context=has[role],
                logprobs=old_logprobs + torch.tensor(values) * has[role][rollout_ids],
            )
            for role, values in gaps.items()
        },
    )


def test_credit_by_hand_in_two_paths():
    right = [0.1, 0.5, 0.1, -0.5, 0.1, 0.1001, 3.0, -3.0]
    algorithm = RLCSD(tau=0.5, mix=0.5, delta=0.02, eta=0.25, wrong_contexts=1)
    credit = algorithm.assign_credit(batch_of({"teacher": right, "wrong[0]": [0.1] * 8}), 0)
    u = 0.5 * math.tanh(0.4 / 0.5)
    v = 0.5 * math.tanh(0.6 / 0.5)
    w, x = 0.5 * math.tanh(2.9 / 0.5), 0.5 * math.tanh(3.1 / 0.5)
    # a token that both hints favour alike, or nearly so, keeps A; the sign of u is e's, not A's
    expected = [A, A + u, -A, -A - v, A, A, -A + w, -A - x]
    assert credit.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert credit.path.tolist() == [0, 1, 0, 1, 0, 0, 1, 1]
    assert credit.token_weights.tolist() == [1, 0.25, 1, 0.25, 1, 1, 0.25, 0.25]
    assert credit.metrics == {"contrasted": 1.0, "selected": 0.5}


def test_each_path_has_its_own_denominator():
    right = [0.1, 0.5, 0.1, -0.5, 0.1, 0.1, 0.1, 3.0]
    algorithm = RLCSD(eta=0.25, wrong_contexts=1)
    batch = batch_of({"teacher": right, "wrong[0]": [0.1] * 8})
    credit = algorithm.assign_credit(batch, 0)
    weights = cases.update_weights(algorithm.reduction, batch, credit)
    assert weights.tolist() == pytest.approx(
        [1 / 5, 0.25 / 3, 1 / 5, 0.25 / 3, 1 / 5, 1 / 5, 1 / 5, 0.25 / 3]
    )


def test_wrong_hints_count_by_their_mean_probability_where_they_were_read():
    gaps = {"teacher": [0.0] * 8, "wrong[0]": [1.0] * 8, "wrong[1]": [-2.0] * 8}
    contexts = {"wrong[0]": [True, True, False, False], "wrong[1]": [True, False, True, False]}
    algorithm = RLCSD(tau=10.0, beta=2.0, mix=1.0, delta=0.0, wrong_contexts=2)
    credit = algorithm.assign_credit(batch_of(gaps, contexts), 0)
    evidence = [-math.log((math.e + math.exp(-2)) / 2), -1.0, 2.0]
    shifted = [
        a + 2 * math.tanh(e / 10) for a, e in zip([A, -A, A], evidence, strict=True) for _ in "ab"
    ]
    assert credit.advantages[:6].tolist() == pytest.approx(shifted, rel=1e-5)
    assert credit.path.tolist() == [1] * 6 + [-1] * 2


def test_a_shift_is_bounded_and_cut_where_it_would_flip_the_sign():
    gaps = {"teacher": [9.0, -9.0] * 4, "wrong[0]": [0.0] * 8}
    algorithm = RLCSD(beta=5.0, mix=1.0, max_shift=0.9, wrong_contexts=1)
    credit = algorithm.assign_credit(batch_of(gaps), 0)
    assert credit.advantages.tolist() == pytest.approx([A + 0.9, 0, 0, -A - 0.9] * 2, rel=1e-5)
    # cut to nothing, a token still counts in its path's denominator
    assert credit.token_weights.tolist() == [1, 0, 0, 1] * 2
    assert credit.path.tolist() == [1] * 8


@pytest.mark.parametrize(
    "contexts",
    [
        {"teacher": [False, True, True, True]},
        {role: [False, True, True, True] for role in ("wrong[0]", "wrong[1]")},
    ],
)
def test_a_rollout_without_both_contexts_leaves_the_update(contexts):
    gaps = {"teacher": [0.3] * 8, "wrong[0]": [-0.3] * 8, "wrong[1]": [0.0] * 8}
    algorithm = RLCSD(wrong_contexts=2)
    batch = batch_of(gaps, contexts)
    credit = algorithm.assign_credit(batch, 0)
    assert credit.path.tolist() == [-1, -1] + [1] * 6
    weights = cases.update_weights(algorithm.reduction, batch, credit)
    assert weights.tolist() == pytest.approx([0] * 2 + [1 / 6] * 6)


def test_the_teachers_read_only_rollouts_with_both_contexts():
    batch = batch_of({"teacher": [0.0] * 8})
    has = {
        "teacher": torch.tensor([True, True, True, True]),
        "wrong[0]": torch.tensor([False, True, True, True]),
        "wrong[1]": torch.tensor([False, False, True, True]),
    }
    algorithm = RLCSD(wrong_contexts=2)
    assert algorithm.needs.teachers == ("teacher", "wrong[0]", "wrong[1]")
    assert algorithm.rows_to_score(batch, has, 0).tolist() == [False, True, True, True]
    swapped = {**has, "wrong[0]": has["wrong[1]"], "wrong[1]": has["wrong[0]"]}
    assert algorithm.rows_to_score(batch, swapped, 0).tolist() == [False, True, True, True]
    assert not RLCSD(mix=0.0, wrong_contexts=2).rows_to_score(batch, has, 0).any()


def test_a_rollout_without_advantage_is_not_shifted_but_counts():
    gaps = {"teacher": [9.0, -9.0] * 4, "wrong[0]": [0.0] * 8}
    batch = dataclasses.replace(batch_of(gaps), rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    credit = RLCSD(wrong_contexts=1).assign_credit(batch, 0)
    assert credit.advantages[4:].tolist() == [0.0] * 4
    assert credit.token_weights[4:].tolist() == [0.0] * 4
    assert credit.path.tolist() == [1] * 8


@pytest.mark.parametrize("off", [{"mix": 0.0}, {"beta": 0.0}])
def test_without_mix_it_is_grpo_bit_for_bit_and_drops_nothing(off):
    for seed in range(20):
        batch = cases.random_case(seed).batch()
        actual = RLCSD(**off).assign_credit(batch, 0)
        expected = GRPO().assign_credit(batch, 0)
        assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


@pytest.mark.parametrize("gap", [50.0, 200.0])
def test_huge_gaps_saturate(gap):
    gaps = {
        "teacher": [gap, -gap] * 4,
        "wrong[0]": [-gap, gap] * 4,
        "wrong[1]": [gap, gap] * 4,
    }
    credit = RLCSD(wrong_contexts=2).assign_credit(batch_of(gaps), 0)
    # the mean of a vast and a vanishing probability is half the vast one: e = log 2
    assert credit.advantages.tolist() == pytest.approx(
        [A + 0.5, A - 0.5, -A + 0.5, -A - 0.5] * 2, rel=1e-5
    )


def test_one_hundred_random_batches_equal_the_plain_formula():
    for seed in range(100):
        case = cases.random_case(seed)
        tau, beta = [0.5, 2.0][seed % 2], [1.0, 3.0, 6.0][seed % 3]
        algorithm = RLCSD(tau=tau, beta=beta, wrong_contexts=2)
        credit = algorithm.assign_credit(case.batch(algorithm.needs), 0)
        per_rollout = reference.group_advantages(case.rewards, case.group_ids, scale_by_std=True)
        right, *wrong = (case.roles[role] for role in algorithm.needs.teachers)
        for token, rollout in enumerate(case.rollout_ids):
            read = [role.logprobs[token] for role in wrong if role.has_context[rollout]]
            a = per_rollout[rollout]
            is_used = case.response_mask[token] and right.has_context[rollout] and bool(read)
            assert (credit.path[token] >= 0).item() == is_used
            if not is_used:
                assert credit.token_weights[token] == 0
                continue
            top = max(read)
            mean = sum(math.exp(logprob - top) for logprob in read) / len(read)
            shift = beta * 0.5 * math.tanh((right.logprobs[token] - top - math.log(mean)) / tau)
            shift = max(-2.0, min(2.0, shift))
            selected = abs(shift) > 0.02
            expected = max(a + shift, 0) if a > 0 else min(a + shift, 0) if a else 0
            assert credit.path[token] == selected
            actual = credit.advantages[token].item()
            assert actual == pytest.approx(expected if selected else a, abs=2e-5)
            assert actual * a >= 0
            assert credit.token_weights[token] == (actual != 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mix", 1.5),
        ("tau", 0.0),
        ("beta", -1.0),
        ("delta", -0.1),
        ("eta", -1.0),
        ("max_shift", -2.0),
        ("wrong_contexts", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} .*{value}"):
        RLCSD(**{field: value})


def test_every_default_says_where_it_stands():
    named = {f.name for f in dataclasses.fields(RLCSD)} | {
        f"{section}.{key}" for section, keys in RLCSD.section_defaults.items() for key in keys
    }
    assert set(RLCSD.sources) == named
