"""The divergences and the methods on them again: float64, plain Python, token by token.

Every derivative is written by hand here and checked against central differences in
`test_differential`. Nothing is shared with the package.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tests.unit import reference
from tests.unit.cases import Case
from tests.unit.reference import Update

Slopes = list[float]
TokenDivergence = Callable[[int], tuple[float, Slopes]]  # token -> value, d value / d logits


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which divergence, on the whole vocabulary or on the ids of the support."""

    kind: str = "jsd"  # or forward_kl, reverse_kl, cross_entropy
    alpha: float = 0.5
    is_full: bool = False
    rest: str = "tail"  # or renormalise
    entry_clip: float | None = None


def log_softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    normaliser = highest + math.log(sum(math.exp(x - highest) for x in logits))
    return [x - normaliser for x in logits]


def log_sum(logs: Sequence[float]) -> float:
    highest = max(logs)
    return highest + math.log(sum(math.exp(x - highest) for x in logs))


def entry(kind: str, s: float, t: float, alpha: float) -> tuple[float, float]:
    """One id's term and its derivative by s; s and t are log-probabilities."""
    if kind == "cross_entropy":
        return -math.exp(t) * s, -math.exp(t)
    if kind == "forward_kl":
        return math.exp(t) * (t - s), -math.exp(t)
    if kind == "reverse_kl":
        return math.exp(s) * (s - t), math.exp(s) * (s - t + 1)
    m = log_sum([math.log(alpha) + t, math.log1p(-alpha) + s])
    term = alpha * math.exp(t) * (t - m) + (1 - alpha) * math.exp(s) * (s - m)
    return term, (1 - alpha) * math.exp(s) * (s - m)  # what m adds to the derivative cancels


def log_rest(logs: Sequence[float]) -> tuple[float, Slopes]:
    """log(1 - sum of exp) as the page computes it, and its derivatives."""
    whole = log_sum(logs)
    x = min(whole, -1e-7)
    slope = 0.0 if whole > -1e-7 else -math.exp(x) / -math.expm1(x)
    return math.log(-math.expm1(x)), [slope * math.exp(log - whole) for log in logs]


def divergence(
    student: Sequence[float], teacher: Sequence[float], ids: Sequence[int], options: Options
) -> tuple[float, Slopes]:
    """Value and its derivative by the student's logits, both sides given as logits [V]."""
    s_all, t_all = log_softmax(student), log_softmax(teacher)
    ids = range(len(student)) if options.is_full else ids
    s, t = [s_all[i] for i in ids], [t_all[i] for i in ids]
    covers = len(s) == len(student)
    if options.rest == "renormalise" and not covers:
        shift_s, shift_t = log_sum(s), log_sum(t)
        s, t = [x - shift_s for x in s], [x - shift_t for x in t]
    value, slopes = 0.0, []
    for a, b in zip(s, t, strict=True):
        term, slope = entry(options.kind, a, b, options.alpha)
        if options.entry_clip is not None and term > options.entry_clip:
            term, slope = options.entry_clip, 0.0
        value += term
        slopes.append(slope)
    if options.rest == "renormalise" and not covers:
        total = sum(slopes)
        slopes = [slope - math.exp(a) * total for slope, a in zip(slopes, s, strict=True)]
    if options.rest == "tail" and not covers:
        tail, by_s = log_rest(s)
        term, slope = entry(options.kind, tail, log_rest(t)[0], options.alpha)
        if options.entry_clip is not None and term > options.entry_clip:
            term, slope = options.entry_clip, 0.0
        value += term
        slopes = [own + slope * part for own, part in zip(slopes, by_s, strict=True)]
    return value, to_logits(dict(zip(ids, slopes, strict=True)), s_all)


def to_logits(by_logprob: dict[int, float], logprobs: Sequence[float]) -> Slopes:
    total = sum(by_logprob.values())
    return [by_logprob.get(i, 0.0) - math.exp(s) * total for i, s in enumerate(logprobs)]


def on_support(case: Case, options: Options) -> TokenDivergence:
    return lambda token: divergence(
        case.student_logits[token], case.teacher_logits[token], case.ids[token], options
    )


def teacher_top1(case: Case) -> TokenDivergence:
    """-log S(v) at the one id of the support."""

    def at(token: int) -> tuple[float, Slopes]:
        s = log_softmax(case.student_logits[token])
        (v,) = case.ids[token]
        return -s[v], to_logits({v: -1.0}, s)

    return at


def student_top1(case: Case) -> TokenDivergence:
    """T(v) (log T(v) - log S(v)) at the one id of the support."""

    def at(token: int) -> tuple[float, Slopes]:
        s = log_softmax(case.student_logits[token])
        (v,) = case.ids[token]
        t = log_softmax(case.teacher_logits[token])[v]
        return math.exp(t) * (t - s[v]), to_logits({v: -math.exp(t)}, s)

    return at


def teacher_samples(case: Case) -> TokenDivergence:
    """-mean_s log S(a_s)."""

    def at(token: int) -> tuple[float, Slopes]:
        s, sampled = log_softmax(case.student_logits[token]), case.ids[token]
        share = 1 / len(sampled)
        return -sum(s[a] for a in sampled) * share, to_logits(dict.fromkeys(sampled, -share), s)

    return at


def distillation(case: Case, token_divergence: TokenDivergence) -> Update:
    """opsd and gkd: the divergence on rollouts with context, which alone count."""
    path = [
        0 if used and case.has_context[rollout] else -1
        for used, rollout in zip(case.response_mask, case.rollout_ids, strict=True)
    ]
    zeros = [0.0] * len(case.student_logits[0])
    pairs = [
        token_divergence(token) if place == 0 else (0.0, zeros) for token, place in enumerate(path)
    ]
    return Update(
        path=path,
        loss=[value for value, _ in pairs],
        by_logprob=[0.0] * len(path),
        by_logits=[slopes for _, slopes in pairs],
    )


def scaled(update: Update, factors: Sequence[float]) -> Update:
    return replace(
        update,
        loss=[f * x for f, x in zip(factors, update.loss, strict=True)],
        by_logprob=[f * x for f, x in zip(factors, update.by_logprob, strict=True)],
        by_logits=[[f * x for x in row] for f, row in zip(factors, update.by_logits, strict=True)],
    )


def sdpo(case: Case, options: Options, *, ratio_clip: float = 2.0) -> Update:
    ratios = [
        min(math.exp(min(max(new - old, -20.0), 20.0)), ratio_clip)
        for new, old in zip(case.logprobs, case.old_logprobs, strict=True)
    ]
    return scaled(distillation(case, on_support(case, options)), ratios)


def srpo(case: Case, options: Options, *, beta: float, scale_by_std: bool) -> Update:
    surrogate = reference.policy_gradient(case, reference.grpo(case, scale_by_std=scale_by_std))
    routed = [
        used and case.has_context[rollout] and not case.is_correct[rollout]
        for used, rollout in zip(case.response_mask, case.rollout_ids, strict=True)
    ]
    raw = [math.exp(-beta * entropy) for entropy in case.roles["teacher"].entropy]
    weights = []
    for token, rollout in enumerate(case.rollout_ids):
        peers = [
            raw[other]
            for other, owner in enumerate(case.rollout_ids)
            if routed[other] and case.minibatch_ids[owner] == case.minibatch_ids[rollout]
        ]
        weights.append(raw[token] / statistics.fmean(peers) if routed[token] else 0.0)
    distilled = scaled(sdpo(case, options), weights)
    return replace(
        surrogate,
        loss=[
            a if is_routed else b
            for a, b, is_routed in zip(distilled.loss, surrogate.loss, routed, strict=True)
        ],
        by_logprob=[
            0.0 if is_routed else slope
            for slope, is_routed in zip(surrogate.by_logprob, routed, strict=True)
        ],
        by_logits=distilled.by_logits,
        advantages=[],  # a routed token has none
    )


def future_credit(case: Case, *, baseline: str | None) -> list[float]:
    """C_t: the mean of the old H^x over the rollout's later response tokens.

    A token without a later one has none: it is not in the mean of its group and position either.
    """
    later = [0.0] * len(case.rollout_ids)
    has_later: set[int] = set()
    for rollout in range(len(case.rewards)):
        tokens = reference.tokens_of(case, rollout)
        for index, token in enumerate(tokens[:-1]):
            has_later.add(token)
            later[token] = statistics.fmean(
                case.roles["teacher"].cross_entropy[t] for t in tokens[index + 1 :]
            )
    if baseline is None:
        return later
    start = [case.rollout_ids.index(rollout) for rollout in range(len(case.rewards))]
    centred = []
    for token, rollout in enumerate(case.rollout_ids):
        peers = [
            later[other]
            for other, owner in enumerate(case.rollout_ids)
            if case.group_ids[owner] == case.group_ids[rollout]
            and other - start[owner] == token - start[rollout]
            and other in has_later
            and case.response_mask[other]
            and case.has_context[owner]
        ]
        is_centred = token in has_later and peers
        centred.append(later[token] - statistics.fmean(peers) if is_centred else 0.0)
    return centred


def distil(
    case: Case,
    token_divergence: TokenDivergence,
    *,
    has_future: bool = True,
    baseline: str | None = None,
) -> Update:
    local = distillation(case, token_divergence)
    if not has_future:
        return local
    credit = [-c for c in future_credit(case, baseline=baseline)]
    future = reference.policy_gradient(case, credit, path=local.path)
    return replace(
        local,
        loss=[a + b for a, b in zip(local.loss, future.loss, strict=True)],
        by_logprob=future.by_logprob,
        advantages=credit,
    )
