import itertools
import math
import statistics
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.dasd import DASD
from megasd.algorithms.grpo import GRPO
from megasd.types import Credit, ResponseBatch, TeacherScores
from tests.unit import cases, reference
from tests.unit.cases import Case, FakeStudent

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0 in a group of two
ROUTES, DIRECTIONS = ("entropy", "position", "attract", "repel"), ("tanh", "hard", "linear")
GATES = ("gap", "none", "magnitude", "fixed")
NEEDS = Needs(teachers=("teacher",), entropy_beside_teacher=True)


def make(**fields: Any) -> DASD:
    """DASD; an unbounded gap is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"algorithm\.max_gap: null", UserWarning)
        return DASD(**fields)


def one_group(
    rewards: list[float],
    lengths: list[int],
    *,
    gap: list[float],
    entropy: list[float],
    has_context: list[bool],
) -> ResponseBatch:
    old_logprobs = torch.full((len(gap),), -1.0)
    per_rollout = torch.zeros(len(rewards), dtype=torch.long)
    return ResponseBatch(
        rewards=torch.tensor(rewards),
        is_correct=torch.tensor(rewards) >= 1,
        group_ids=per_rollout,
        minibatch_ids=per_rollout,
        rollout_ids=torch.arange(len(rewards)).repeat_interleave(torch.tensor(lengths)),
        response_mask=torch.ones(len(gap), dtype=torch.bool),
        max_response_tokens=9,
        old_logprobs=old_logprobs,
        entropy=torch.tensor(entropy),
        teachers={
            "teacher": TeacherScores(
                has_context=torch.tensor(has_context),
                logprobs=old_logprobs + torch.tensor(gap),
            )
        },
    )


@pytest.fixture
def batch() -> ResponseBatch:
    """A right rollout of four tokens; a wrong one without context, of one."""
    return one_group(
        [1.0, 0.0],
        [4, 1],
        gap=[0.25, -0.5, 0.75, -4.0, 0.0],
        entropy=[0.0, 1.0, 2.0, 5.0, 1.0],
        has_context=[True, False],
    )


# Of the first rollout: median |D| = (0.5 + 0.75) / 2, tau = 0.6, s = (2 + 1 + 0 + 3) / 4
DN = [0.4, -0.8, 1.2, -3.0]  # the last one capped: -6.4
BELOW = [0.6 / 1.5, -0.4 / 1.5, -1.4 / 1.5, -4.4 / 1.5]
# and by position: sin(2 pi t / 4) = 0, 1, 0, -1 of mean 0, tau = -0.4, s = 0.5
BY_POSITION = [-0.8, -2.8, -0.8, 1.2]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_credit_by_hand(batch):
    credit = DASD(beta=0.5).assign_credit(batch, 0)
    pushes = [0.5 * math.tanh(b) * sigmoid(abs(d) - 1) * d for b, d in zip(BELOW, DN, strict=True)]
    # sure and expected: earns more; unsure and expected: earns less; unsure, unexpected: more
    assert [push > 0 for push in pushes] == [True, True, False, True]
    assert credit.advantages[:4].tolist() == pytest.approx([A + push for push in pushes], rel=1e-5)
    assert credit.advantages[4] == GRPO().assign_credit(batch, 0).advantages[4]
    assert credit.path.tolist() == [0] * 5
    assert credit.token_weights.tolist() == [1] * 5
    assert credit.metrics == pytest.approx(
        {"gap_median": 0.625, "gap_capped": 0.25, "push_max": pushes[3]}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"direction": "hard"}, [1, -1, -1, -1]),
        ({"direction": "linear"}, [*BELOW[:3], -1]),
        ({"route": "position"}, [math.tanh(x) for x in BY_POSITION]),
        ({"route": "position", "direction": "linear"}, [-0.8, -1, -0.8, 1]),
        ({"route": "attract"}, [1, 1, 1, 1]),
        ({"route": "repel", "direction": "linear"}, [-1, -1, -1, -1]),
        ({"quantile": 1.0, "direction": "hard"}, [1, 1, 1, 0]),
    ],
)
def test_each_route_and_direction_by_hand(batch, fields, expected):
    credit = DASD(beta=1.0, gate="none", **fields).assign_credit(batch, 0)
    z = [(a - A) / d for a, d in zip(credit.advantages[:4].tolist(), DN, strict=True)]
    assert z == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("gap", [sigmoid(abs(d) - 1) for d in DN]),
        ("none", [1, 1, 1, 1]),
        ("magnitude", [0.4, 0.8, 1.2, 3.0]),
        ("fixed", [0, 0, 1, 1]),  # of the raw gap, in nats
    ],
)
@pytest.mark.parametrize(("route", "sign"), [("attract", 1), ("repel", -1)])
def test_each_gate_by_hand(batch, gate, expected, route, sign):
    credit = DASD(beta=1.0, route=route, gate=gate, min_gap=0.5).assign_credit(batch, 0)
    actual = [sign * (a - A) / d for a, d in zip(credit.advantages[:4].tolist(), DN, strict=True)]
    assert actual == pytest.approx(expected, abs=1e-5)


def test_without_a_cap_it_is_the_printed_formula(batch):
    with pytest.warns(UserWarning, match=r"^algorithm\.max_gap: null may collapse the run"):
        algorithm = DASD(beta=1.0, route="attract", gate="none", max_gap=None)
    credit = algorithm.assign_credit(batch, 0)
    assert credit.advantages[3].item() == pytest.approx(A - 6.4, rel=1e-5)
    assert credit.metrics["gap_capped"] == 0


def test_four_fifths_of_the_tokens_are_pushed_away():
    entropy = torch.rand(101, generator=torch.manual_seed(0)).tolist()
    batch = one_group([1.0], [101], gap=[1.0] * 101, entropy=entropy, has_context=[True])
    credit = DASD(quantile=0.2).assign_credit(batch, 0)
    assert (credit.advantages > 0).sum() == 20
    assert (credit.advantages < 0).sum() == 80


def test_it_learns_where_every_reward_is_equal_and_may_flip_a_sign(batch):
    equal = one_group(
        [0.0, 0.0], [2, 2], gap=[1.0] * 4, entropy=[0.0, 3.0] * 2, has_context=[True, True]
    )
    credit = DASD().assign_credit(equal, 0)
    assert credit.token_weights.tolist() == [1, 1, 1, 1]
    assert credit.advantages.sign().tolist() == [1, -1, 1, -1]
    flipped = DASD(beta=9.0, route="repel").assign_credit(batch, 0).advantages
    assert flipped[2] < 0 < A


def assert_same(actual: Credit, expected: Credit) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual[:3], expected[:3], strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("gate", GATES)
def test_without_beta_or_context_it_is_grpo_bit_for_bit(route, gate):
    for seed in range(20):
        case = cases.random_case(seed)
        expected = GRPO().assign_credit(case.batch(), 0)
        blind = make(route=route, gate=gate, beta=0.0, max_gap=None)
        assert_same(blind.assign_credit(case.batch(NEEDS), 0), expected)
        nobody = DASD(route=route, gate=gate).assign_credit(case.batch(Needs(entropy=True)), 0)
        assert_same(nobody, expected)
        assert nobody.metrics == {}


def test_attract_and_repel_are_mirrored_around_the_advantage():
    for seed in range(50):
        batch = cases.random_case(seed).batch(NEEDS)
        middle = GRPO().assign_credit(batch, 0).advantages
        pulled, pushed = (
            DASD(route=route).assign_credit(batch, 0).advantages for route in ("attract", "repel")
        )
        torch.testing.assert_close(pulled - middle, middle - pushed, rtol=1e-5, atol=1e-6)
        assert not torch.equal(pulled, pushed) or not batch.teacher_gap().any()


def test_the_coefficient_of_a_token_s_gradient_is_its_credit(batch):
    algorithm = DASD(beta=0.5)
    credit = algorithm.assign_credit(batch, 0)
    assert batch.old_logprobs is not None
    logprobs = batch.old_logprobs.clone().requires_grad_()
    loss = algorithm.token_loss(FakeStudent(logprobs), batch, credit).loss
    (slopes,) = torch.autograd.grad(loss.sum(), logprobs)
    omega = [math.tanh(b) * sigmoid(abs(d) - 1) for b, d in zip(BELOW, DN, strict=True)]
    expected = [A + 0.5 * w * d for w, d in zip(omega, DN, strict=True)]
    assert (-slopes[:4]).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("route", "omega"), [("attract", 1.0), ("repel", -1.0)])
def test_proposition_1_the_push_descends_omega_times_the_reverse_kl(route, omega):
    """With the raw gap and a fixed omega, in expectation over the student's own tokens.

    The rollout holds each token of the vocabulary once, so the median is one constant, which
    beta takes out again; A, a constant too, adds nothing in expectation.
    """
    generator = torch.manual_seed(1)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    student = logits.log_softmax(0)
    teacher = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    old = student.detach()
    raw = (teacher - old).tolist()
    batch = one_group(
        [1.0, 0.0], [7, 1], gap=[*raw, 0.0], entropy=[1.0] * 8, has_context=[True, False]
    )
    median = statistics.median(map(abs, raw))
    algorithm = make(beta=0.3 * (median + 1e-6), route=route, gate="none", max_gap=None)
    advantages = algorithm.assign_credit(batch, 0).advantages[:7].double()
    surrogate = (old.exp() * advantages * student).sum()
    (ascent,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    reverse_kl = (student.exp() * (student - teacher)).sum()
    (slope,) = torch.autograd.grad(reverse_kl, logits)
    torch.testing.assert_close(ascent, -0.3 * omega * slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("route", "gate"), list(itertools.product(ROUTES, GATES)))
def test_huge_gaps_over_a_median_of_zero_stay_finite(route, gate):
    batch = one_group(
        [1.0, 0.0],
        [5, 1],
        gap=[0.0, 0.0, 0.0, 500.0, -500.0, -500.0],
        entropy=[0.0] * 6,
        has_context=[True, True],
    )
    for max_gap in (3.0, None):
        credit = make(route=route, gate=gate, max_gap=max_gap).assign_credit(batch, 0)
        assert credit.advantages.isfinite().all()
        assert math.isfinite(credit.metrics["push_max"])


def plain_push(case: Case, algorithm: DASD, rollout: int) -> dict[int, float]:
    """beta z gate Dn of a rollout's response tokens, one after the other."""
    tokens = [
        token
        for token, owner in enumerate(case.rollout_ids)
        if owner == rollout and case.response_mask[token]
    ]
    if not tokens:
        return {}
    gaps = [case.teacher_logprobs[token] - case.old_logprobs[token] for token in tokens]
    signal = [
        case.entropy[token]
        if algorithm.route == "entropy"
        else round(math.sin(2 * math.pi * place / len(tokens)), 9)
        for place, token in enumerate(tokens)
    ]
    tau = float(np.quantile(signal, algorithm.quantile))
    s = statistics.mean(abs(x - statistics.mean(signal)) for x in signal)
    median = statistics.median(map(abs, gaps))
    pushes = {}
    for token, gap, x in zip(tokens, gaps, signal, strict=True):
        below = (tau - x) / (s + 1e-6)
        shapes = {
            "tanh": math.tanh(below),
            "hard": math.copysign(1.0, below) if below else 0.0,
            "linear": max(-1.0, min(1.0, below)),
        }
        z = {"attract": 1.0, "repel": -1.0}.get(algorithm.route, shapes[algorithm.direction])
        normalised = gap / (median + 1e-6)
        if algorithm.max_gap is not None:
            normalised = max(-algorithm.max_gap, min(algorithm.max_gap, normalised))
        gate = {
            "gap": sigmoid(min(abs(normalised) - 1, 700)),
            "none": 1,
            "magnitude": abs(normalised),
            "fixed": abs(gap) > algorithm.min_gap,
        }[algorithm.gate]
        pushes[token] = algorithm.beta * z * gate * normalised
    return pushes


@pytest.mark.parametrize(
    ("route", "direction", "gate"), list(itertools.product(ROUTES, DIRECTIONS, GATES))
)
def test_random_batches_equal_the_plain_reference(route, direction, gate):
    for seed in range(12):
        case = cases.random_case(seed)
        algorithm = make(
            route=route,
            direction=direction,
            gate=gate,
            quantile=[0.2, 0.5][seed % 2],
            max_gap=[3.0, 1.5, None][seed % 3],
        )
        advantages = reference.group_advantages(case.rewards, case.group_ids, scale_by_std=True)
        credit = algorithm.assign_credit(case.batch(NEEDS), 0)
        for rollout, advantage in enumerate(advantages):
            for token, push in plain_push(case, algorithm, rollout).items():
                actual = credit.advantages[token].item()
                assert actual == pytest.approx(advantage + push, rel=1e-4, abs=1e-5)
        assert credit.path.tolist() == case.path


def test_what_must_be_read_before():
    assert DASD().needs == NEEDS
    assert not DASD(route="position").needs.entropy_beside_teacher
    assert not DASD(beta=0.0).needs.entropy_beside_teacher
    batch = cases.random_case(0).batch(NEEDS)
    assert DASD().rows_to_score(batch, {}, 0).all()
    assert not DASD(beta=0.0).rows_to_score(batch, {}, 0).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta", -0.1), ("quantile", 1.2), ("max_gap", 0.0), ("min_gap", -1.0), ("beta", math.nan)],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} .*{value}"):
        DASD(**{field: value})
