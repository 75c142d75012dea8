"""Every method on 200 random batches equals the plain reference: credit, loss and gradient."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megasd.algorithms.antisd import AntiSD
from megasd.algorithms.base import Algorithm
from megasd.algorithms.cepo import CEPO
from megasd.algorithms.dasd import DASD
from megasd.algorithms.distil import DistIL
from megasd.algorithms.distilled_rl import DistilledRL
from megasd.algorithms.entropy_bonus import EntropyBonus
from megasd.algorithms.gkd import GKD
from megasd.algorithms.grpo import GRPO
from megasd.algorithms.grpo_opsd import GRPOWithOPSD
from megasd.algorithms.hepo import HEPO
from megasd.algorithms.opd import OPD
from megasd.algorithms.opsd import OPSD
from megasd.algorithms.rlcsd import RLCSD
from megasd.algorithms.rlrt import RLRT
from megasd.algorithms.rlsd import RLSD
from megasd.algorithms.sdpo import SDPO
from megasd.algorithms.sft import SFT
from megasd.algorithms.srpo import SRPO
from megasd.algorithms.temporal import Temporal
from megasd.losses import reduce
from megasd.losses.config import DivergenceConfig
from megasd.losses.policy_gradient import ClipRange
from megasd.types import Credit, ResponseBatch
from tests.unit import cases, reference
from tests.unit import reference_distributions as distributions
from tests.unit.cases import Case, FakeStudent
from tests.unit.reference import Update, policy_gradient
from tests.unit.reference_distributions import Options, TokenDivergence

SEEDS = range(200)
Pair = tuple[Algorithm, Update]


def cycle(seed: int, *options: Any) -> Any:
    """Another option for every seed; different numbers of options run through all pairs."""
    return options[seed % len(options)]


def grpo(case: Case, seed: int, step: int) -> Pair:
    scale_by_std, dual = cycle(seed, True, False, True), cycle(seed, None, None, 3.0)
    algorithm = GRPO(scale_by_std=scale_by_std, clip=ClipRange(dual=dual))
    credit = reference.grpo(case, scale_by_std=scale_by_std)
    return algorithm, policy_gradient(case, credit, dual=dual)


def grpo_with_penalties(case: Case, seed: int, step: int) -> Pair:
    coefs = {"kl_coef": cycle(seed, 0.1, 2.0), "entropy_coef": cycle(seed, 0.0, 0.3, 1.0)}
    estimator = cycle(seed, "k1", "k2", "k3")
    surrogate = policy_gradient(case, reference.grpo(case))
    penalty = reference.reference_penalty(case, estimator=estimator, **coefs)
    return GRPO(kl_estimator=estimator, **coefs), add(surrogate, penalty)


def add(a: Update, b: Update) -> Update:
    return dataclasses.replace(
        a,
        loss=[x + y for x, y in zip(a.loss, b.loss, strict=True)],
        by_logprob=[x + y for x, y in zip(a.by_logprob, b.by_logprob, strict=True)],
        by_logits=a.by_logits or b.by_logits,
    )


def rlsd(case: Case, seed: int, step: int) -> Pair:
    fields = {"mix": cycle(seed, 0.5, 0.9), "max_deviation": cycle(seed, 0.2, 0.5, 1.0)}
    is_pessimistic = cycle(seed, True, False, False, False, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm = RLSD(credit="pessimistic" if is_pessimistic else "clipped", **fields)
    fields["mix"] = reference.mix_at(step, fields["mix"], 50)
    credit = [
        reference.rlsd_advantage(
            a, reference.gap(case, token), pessimistic=is_pessimistic, **fields
        )
        for token, a in enumerate(reference.grpo(case))
    ]
    return algorithm, policy_gradient(case, credit)


def rlrt(case: Case, seed: int, step: int) -> Pair:
    if cycle(seed, True, False, False):  # the defaults
        credit = reference.rlrt(case, mix=0.5, max_deviation=1.0, scale_by_std=True)
        return RLRT(), policy_gradient(case, credit)
    mix, mix_steps = cycle(seed, 0.5, 0.9), cycle(seed, None, 30)
    fields = {
        "gate": cycle(seed, "correct", "all"),
        "max_deviation": cycle(seed, 0.5, 0.2, 1.0),
        "scale_by_std": cycle(seed, True, True, True, False),
    }
    credit = reference.rlrt(case, mix=reference.mix_at(step, mix, mix_steps), **fields)
    return RLRT(mix=mix, mix_steps=mix_steps, **fields), policy_gradient(case, credit)


def cepo(case: Case, seed: int, step: int) -> Pair:
    fields = {"max_deviation": cycle(seed, 0.2, 0.2, 0.9), "scale_by_std": seed % 4 > 0}
    mix = reference.mix_at(step, 0.5, 25)
    return CEPO(**fields), policy_gradient(case, reference.cepo(case, mix=mix, **fields))


def dasd(case: Case, seed: int, step: int) -> Pair:
    fields: dict[str, Any] = {}
    if seed % 4 > 0:
        fields = {
            "beta": cycle(seed, 0.1, 1.0),
            "quantile": cycle(seed, 0.2, 0.5, 0.77, 1.0, 0.0),
            "max_gap": cycle(seed, 3.0, 0.5, None),
            "route": cycle(seed, "entropy", "entropy", "position", "attract", "repel"),
            "direction": cycle(seed, "tanh", "hard", "linear", "tanh", "tanh", "linear", "hard"),
            "gate": cycle(seed, *["gap", "none", "magnitude", "fixed", "gap", "gap", "fixed"] * 3),
            "min_gap": cycle(seed, 0.1, 1.0),
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm = DASD(**fields)
    return algorithm, policy_gradient(case, reference.dasd(case, **fields))


def hepo(case: Case, seed: int, step: int) -> Pair:
    fields = {} if seed % 2 else {"token_share": cycle(seed, 0.07, 0.6, 1.0)}
    path = reference.hepo_path(case, **fields)
    return HEPO(**fields), policy_gradient(case, reference.grpo(case), path=path)


def entropy_bonus(case: Case, seed: int, step: int) -> Pair:
    fields = {} if seed % 2 else {"alpha": cycle(seed, 0.1, 3.0, 1.0), "kappa": cycle(seed, 4.0)}
    credit = reference.with_entropy_bonus(case, reference.grpo(case), **fields)
    return EntropyBonus(**fields), policy_gradient(case, credit)


def opd(case: Case, seed: int, step: int) -> Pair:
    uses_rewards, coef = cycle(seed, True, False), cycle(seed, 1.0, 1.0, 0.3)
    credit = reference.opd(case, coef=coef, uses_rewards=uses_rewards, scale_by_std=True)
    return OPD(A_env=uses_rewards, coef=coef), policy_gradient(case, credit)


def rlcsd(case: Case, seed: int, step: int) -> Pair:
    fields: dict[str, Any] = {}
    if seed % 3 > 0:
        fields = {
            "tau": cycle(seed, 0.02, 1.0, 5.0),
            "beta": cycle(seed, 1.0, 8.0),
            "mix": cycle(seed, 0.5, 1.0, 0.25, 0.1),
            "delta": cycle(seed, 0.02, 0.3),
            "eta": cycle(seed, 1.0, 2.0),
        }
    return RLCSD(wrong_contexts=2, **fields), reference.rlcsd(case, **fields)


def distilled_rl(case: Case, seed: int, step: int) -> Pair:
    return DistilledRL(), policy_gradient(case, reference.distilled_rl(case))


def temporal(case: Case, seed: int, step: int) -> Pair:
    schedule = cycle(seed, "tail_first", "forking", "entropy_bonus")
    base, steps = cycle(seed, "grpo", "rlrt", "dasd", "grpo", "dasd"), cycle(seed, 80, 40, 10, 7)
    algorithm = Temporal(base=base, schedule=schedule, steps=steps)
    credit = {
        "grpo": lambda: reference.grpo(case),
        "rlrt": lambda: reference.rlrt(case, mix=0.5, max_deviation=1.0, scale_by_std=True),
        "dasd": lambda: reference.dasd(case),
    }[base]()
    left, path = max(1 - Fraction(step, steps), Fraction(0)), case.path
    if schedule == "tail_first":
        path = reference.tail_path(case, start=Fraction("0.99") * left)
    if schedule == "forking":
        path = reference.hepo_path(case, token_share=1 - Fraction("0.8") * left)
    if schedule == "entropy_bonus":
        credit = reference.with_entropy_bonus(case, credit, alpha=0.4 * float(left))
    return algorithm, policy_gradient(case, credit, path=path)


def options_of(config: DivergenceConfig) -> Options:
    return Options(
        kind=config.kind,
        alpha=config.alpha,
        is_full=config.support == "full",
        rest=config.rest,
        entry_clip=config.entry_clip,
    )


def divergence_config(seed: int) -> DivergenceConfig:
    return DivergenceConfig(
        kind=cycle(seed, "jsd", "forward_kl", "reverse_kl"),
        alpha=cycle(seed, 0.5, 0.1),
        support=cycle(seed, "student", "full", "teacher", "student", "full"),
        rest=cycle(seed, "tail", "tail", "tail", "renormalise"),
        entry_clip=cycle(seed, None, None, None, None, None, None, 0.05),
    )


def opsd(case: Case, seed: int, step: int) -> Pair:
    if seed % 5 == 0 and len(case.ids[0]) == 1:
        if seed % 2 == 0:
            single = distributions.teacher_top1(case)
            return OPSD(ablation="teacher_top1"), distributions.distillation(case, single)
        single = distributions.student_top1(case)
        return OPSD(ablation="student_top1"), distributions.distillation(case, single)
    if seed % 5 == 1:
        full = distributions.on_support(case, Options(is_full=True))
        return OPSD(), distributions.distillation(case, full)
    return distilled(OPSD, case, divergence_config(seed))


def distilled(method: Callable[..., Algorithm], case: Case, config: DivergenceConfig) -> Pair:
    compared = distributions.on_support(case, options_of(config))
    return method(divergence=config), distributions.distillation(case, compared)


def gkd(case: Case, seed: int, step: int) -> Pair:
    return distilled(GKD, case, divergence_config(seed))


def sdpo(case: Case, seed: int, step: int) -> Pair:
    if seed % 3 == 0:
        return SDPO(), distributions.sdpo(case, Options())
    config, clip = divergence_config(seed), cycle(seed, 2.0, 1.1)
    algorithm = SDPO(divergence=config, max_importance_ratio=clip)
    return algorithm, distributions.sdpo(case, options_of(config), ratio_clip=clip)


def srpo(case: Case, seed: int, step: int) -> Pair:
    if seed % 3 == 0:
        return SRPO(), distributions.srpo(case, Options(), beta=1.0, scale_by_std=False)
    config = divergence_config(seed)
    fields = {"beta": cycle(seed, 0.5, 0.0), "scale_by_std": cycle(seed, False, True, True)}
    expected = distributions.srpo(case, options_of(config), **fields)
    return SRPO(divergence=config, **fields), expected


def grpo_opsd(case: Case, seed: int, step: int) -> Pair:
    coef, config = cycle(seed, 0.5, 0.1, 0.9), divergence_config(seed)
    surrogate = policy_gradient(case, [(1 - coef) * a for a in reference.grpo(case)])
    _, distillation = distilled(GKD, case, config)
    of_all, of_read = (
        reference.minibatch_weights("sequence_mean", path, case)
        for path in (case.path, distillation.path)
    )
    scaled = distributions.scaled(
        distillation,
        [coef * b / a if b else 0.0 for a, b in zip(of_all, of_read, strict=True)],
    )
    return GRPOWithOPSD(coef=coef, divergence=config), add(surrogate, scaled)


def distil(case: Case, seed: int, step: int) -> Pair:
    teacher = cycle(seed, "distribution", "distribution", "samples")
    has_future, baseline = cycle(seed, True, True, True, False, True), "none"
    if has_future and seed % 2 and len(set(case.group_ids)) < len(case.group_ids):
        baseline = "group_position"
    algorithm = DistIL(teacher=teacher, future_credit=has_future, baseline=baseline)
    compared: TokenDivergence = (
        distributions.teacher_samples(case)
        if teacher == "samples"
        else distributions.on_support(case, Options(kind="cross_entropy"))
    )
    centred = None if baseline == "none" else baseline
    return algorithm, distributions.distil(case, compared, has_future=has_future, baseline=centred)


def sft(case: Case, seed: int, step: int) -> Pair:
    return SFT(), reference.sft(case)


CREDIT_METHODS = [
    grpo,
    grpo_with_penalties,
    rlsd,
    rlrt,
    cepo,
    dasd,
    hepo,
    entropy_bonus,
    opd,
    rlcsd,
    distilled_rl,
    temporal,
    sft,
]
DISTRIBUTION_METHODS = [opsd, gkd, sdpo, srpo, grpo_opsd, distil]


@pytest.mark.parametrize("method", CREDIT_METHODS)
def test_a_credit_method_equals_the_plain_reference(method):
    for case, seed, step in random_cases():
        algorithm, expected = method(case, seed, step)
        batch = case.batch(algorithm.needs)
        compare(algorithm, case, batch, case.student(batch), step, expected)


@pytest.mark.parametrize("method", DISTRIBUTION_METHODS)
def test_a_distribution_method_equals_the_plain_reference(method):
    # In float64: a tail's logarithm is not good to 1e-5 in float32, whoever computes it.
    for case, seed, step in random_cases():
        algorithm, expected = method(case, seed, step)
        batch = wide(case.batch(algorithm.needs))
        if batch.support is None:  # nothing is left out: then float32 is as good
            exact = case.batch(algorithm.needs)
            compare(algorithm, case, exact, case.student(exact), step, expected, atol=5e-6)
        elif batch.support.teacher_logprobs is not None:
            exact = torch.tensor(case.teacher_logits, dtype=torch.float64).log_softmax(-1)
            support = dataclasses.replace(
                batch.support, teacher_logprobs=exact.gather(1, batch.support.ids)
            )
            batch = dataclasses.replace(batch, support=support)
        student = FakeStudent(
            torch.tensor(case.logprobs, dtype=torch.float64, requires_grad=True),
            logits=torch.tensor(case.student_logits, dtype=torch.float64, requires_grad=True),
            batch=batch,
        )
        compare(algorithm, case, batch, student, step, expected)


def test_antisd_equals_the_plain_reference_step_by_step():
    for start in range(0, 200, 20):
        fields = {} if start % 40 else {"lam": 2.0, "scale_by_std": False}
        algorithm, expected, memory = AntiSD(**fields), reference.AntiSD(**fields), {}
        for step in range(20):
            case = cases.random_case(start + step)
            batch = dataclasses.replace(case.batch(algorithm.needs), memory=memory)
            update = policy_gradient(case, expected(case, step))
            credit = compare(algorithm, case, batch, case.student(batch), step, update)
            memory = credit.memory


@pytest.mark.parametrize("method", CREDIT_METHODS + DISTRIBUTION_METHODS)
def test_rollouts_that_no_teacher_need_read_change_nothing_when_read(method):
    for case, seed, step in random_cases(range(60)):
        algorithm, _ = method(case, seed, step)
        rows = algorithm.rows_to_score(
            case.batch(algorithm.needs),
            {role: torch.tensor(scores.has_context) for role, scores in case.roles.items()},
            step,
        )
        if rows.all():
            continue
        full, skipped = (
            weighted(algorithm, batch, case.student(batch), algorithm.assign_credit(batch, step))
            for batch in (case.batch(algorithm.needs), without(case, rows).batch(algorithm.needs))
        )
        assert torch.equal(full, skipped)


def test_the_reference_s_own_slopes_are_those_of_central_differences():
    step = 1e-4
    for seed in range(40):
        case = cases.random_case(seed)
        config = divergence_config(seed)
        options = cycle(seed, options_of(config), Options(kind="cross_entropy"))
        compared = (
            distributions.on_support(case, options)
            if seed % 8
            else distributions.teacher_samples(case)
        )
        for token in range(min(3, len(case.ids))):
            _, slopes = compared(token)
            row = case.student_logits[token]
            for i in range(cases.VOCABULARY):
                before = row[i]
                values = []
                for shift in (step, -step):
                    row[i] = before + shift
                    values.append(compared(token)[0])
                row[i] = before
                difference = (values[0] - values[1]) / (2 * step)
                assert difference == pytest.approx(slopes[i], rel=1e-4, abs=2e-6), (seed, options)


def random_cases(seeds: range = SEEDS) -> Iterator[tuple[Case, int, int]]:
    for seed in seeds:
        yield cases.random_case(seed), seed, seed % 60


def compare(
    algorithm: Algorithm,
    case: Case,
    batch: ResponseBatch,
    student: FakeStudent,
    step: int,
    expected: Update,
    *,
    atol: float = 1e-12,
) -> Credit:
    """Path, advantage, loss of each token in the update, and the derivatives of their sum.

    To 1e-5 of each value or 1e-7 of the batch's largest; `atol` is for float32, which is no
    better where a divergence's terms cancel.
    """
    credit = algorithm.assign_credit(batch, step)
    counted = torch.tensor(expected.path) >= 0
    assert torch.where(batch.response_mask, credit.path, -1).tolist() == expected.path
    if expected.advantages:
        used = counted & (credit.token_weights != 0)
        unused = counted & ~used  # whoever adds nothing may be skipped, and is compared below
        wanted = torch.tensor(expected.advantages, dtype=torch.float64)
        assert_near(credit.advantages[used], wanted[used], atol)
        assert not unused.any() or not torch.tensor(expected.loss)[unused].any()
    losses = weighted(algorithm, batch, student, credit)
    losses.sum().backward()
    shares = torch.tensor(
        reference.minibatch_weights(algorithm.reduction, expected.path, case), dtype=torch.float64
    )
    wanted = shares * torch.tensor(expected.loss, dtype=torch.float64)
    assert_near(losses.detach(), wanted, atol)
    assert abs(losses.sum().item() - wanted.sum()) <= 1e-5 * wanted.abs().sum() + atol
    by_logprob = torch.tensor(expected.by_logprob, dtype=torch.float64)
    assert_near(gradient(student.logprobs), shares * by_logprob, atol)
    assert student.logits is not None
    if expected.by_logits:
        by_logits = torch.tensor(expected.by_logits, dtype=torch.float64)
        assert_near(gradient(student.logits), shares[:, None] * by_logits, atol)
    else:
        assert student.logits.grad is None
    return credit


def weighted(
    algorithm: Algorithm, batch: ResponseBatch, student: FakeStudent, credit: Credit
) -> Tensor:
    """Each token's part of the loss, mini-batches added up. Nothing may hide a nan x 0."""
    weights = torch.zeros_like(credit.token_weights)
    for minibatch in batch.minibatch_ids.unique():
        inside = batch.response_mask & (batch.minibatch_ids[batch.rollout_ids] == minibatch)
        weights += credit.token_weights * reduce.reduction_weights(
            algorithm.reduction,
            torch.where(inside, credit.path, -1),
            batch.rollout_ids,
            num_rollouts=batch.num_rollouts,
            max_response_tokens=batch.max_response_tokens,
        )
    return algorithm.token_loss(student, batch, credit).loss * weights


def gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def assert_near(actual: Tensor, expected: Tensor, atol: float) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    atol = max(1e-7 * largest, atol)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=atol)


def wide(values: Any) -> Any:
    """The same dataclass, mapping or tensor with every float tensor in float64."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {key: wide(value) for key, value in values.items()}
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        fields = {f.name: wide(getattr(values, f.name)) for f in dataclasses.fields(values)}
        return type(values)(**fields)
    return values


def without(case: Case, rows: Tensor) -> Case:
    """The same batch where teachers read only `rows`."""
    roles = {}
    for name, role in case.roles.items():
        is_read = [bool(rows[rollout]) for rollout in case.rollout_ids]
        roles[name] = dataclasses.replace(
            role,
            has_context=[a and bool(b) for a, b in zip(role.has_context, rows, strict=True)],
            logprobs=[
                new if keep else old
                for new, old, keep in zip(role.logprobs, case.old_logprobs, is_read, strict=True)
            ],
            entropy=[keep * x for x, keep in zip(role.entropy, is_read, strict=True)],
            cross_entropy=[keep * x for x, keep in zip(role.cross_entropy, is_read, strict=True)],
        )
    return dataclasses.replace(case, roles=roles)
