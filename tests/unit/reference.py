"""The methods again, written the slow way: float64, plain Python, one rollout after the other.

The arithmetic shares no line with the package, so that agreement means something. This file holds
the credit methods and everything around them; `reference_distributions` the divergences.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from tests.unit.cases import Case


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a method does with every token: loss (times the token's own weight) and derivatives.

    `path` names the average that a token belongs to, -1 none; the loss is 0 there.
    """

    path: list[int]
    loss: list[float]
    by_logprob: list[float]  # d loss / d logprob
    by_logits: list[list[float]] = field(default_factory=list)  # [N, V]; []: all 0
    advantages: list[float] = field(default_factory=list)


def group_advantages(
    rewards: Sequence[float], group_ids: Sequence[int], *, scale_by_std: bool
) -> list[float]:
    advantages = []
    for reward, group in zip(rewards, group_ids, strict=True):
        peers = [r for r, g in zip(rewards, group_ids, strict=True) if g == group]
        if max(peers) == min(peers):
            advantages.append(0.0)
            continue
        scale = statistics.stdev(peers) + 1e-6 if scale_by_std else 1.0
        advantages.append((reward - statistics.mean(peers)) / scale)
    return advantages


def overlong_penalty(length: int, *, buffer_tokens: float, max_response_tokens: int) -> float:
    if length <= max_response_tokens - buffer_tokens:
        return 0.0
    if length <= max_response_tokens:
        return ((max_response_tokens - buffer_tokens) - length) / buffer_tokens
    return -1.0


def surrogate(
    logprob: float, old: float, advantage: float, *, low: float, high: float, dual: float | None
) -> tuple[float, float]:
    """Loss of a token and its derivative by the token's log-probability."""
    difference = logprob - old
    ratio = math.exp(min(max(difference, -20.0), 20.0))
    is_saturated = abs(difference) > 20
    if advantage >= 0:
        if ratio > 1 + high:
            return -(1 + high) * advantage, 0.0
    else:
        if ratio < 1 - low:
            return -(1 - low) * advantage, 0.0
        if dual is not None and ratio > dual:
            return -dual * advantage, 0.0
    return -ratio * advantage, 0.0 if is_saturated else -ratio * advantage


def reduction_weights(
    reduction: str, path: Sequence[int], rollout_ids: Sequence[int], max_response_tokens: int
) -> list[float]:
    weights = []
    for this_path, this_rollout in zip(path, rollout_ids, strict=True):
        if this_path < 0:
            weights.append(0.0)
            continue
        owners = [r for r, p in zip(rollout_ids, path, strict=True) if p == this_path]
        denominator = {
            "token_mean": len(owners),
            "sequence_mean": owners.count(this_rollout) * len(set(owners)),
            "constant": max_response_tokens * len(set(owners)),
        }[reduction]
        weights.append(1 / denominator)
    return weights


def minibatch_weights(reduction: str, path: Sequence[int], case: Case) -> list[float]:
    """The same where every mini-batch has its own denominators."""
    weights = [0.0] * len(path)
    for minibatch in set(case.minibatch_ids):
        inside = [case.minibatch_ids[rollout] == minibatch for rollout in case.rollout_ids]
        here = [p if is_in else -1 for p, is_in in zip(path, inside, strict=True)]
        shares = reduction_weights(reduction, here, case.rollout_ids, case.max_response_tokens)
        weights = [weight + share for weight, share in zip(weights, shares, strict=True)]
    return weights


def gap(case: Case, token: int, role: str = "teacher") -> float:
    scores = case.roles[role]
    if not scores.has_context[case.rollout_ids[token]]:
        return 0.0
    return scores.logprobs[token] - case.old_logprobs[token]


def tokens_of(case: Case, rollout: int) -> list[int]:
    """The response tokens that the policy produced."""
    return [
        token
        for token, owner in enumerate(case.rollout_ids)
        if owner == rollout and case.response_mask[token]
    ]


def policy_gradient(
    case: Case,
    advantages: list[float],
    *,
    path: list[int] | None = None,
    weights: Sequence[float] | None = None,
    low: float = 0.2,
    high: float = 0.28,
    dual: float | None = None,
) -> Update:
    """-pg(A_hat) on every token of `path`, by default on all that the policy produced."""
    path = case.path if path is None else path
    pairs = [
        surrogate(case.logprobs[token], case.old_logprobs[token], a, low=low, high=high, dual=dual)
        for token, a in enumerate(advantages)
    ]
    scales = [
        (1.0 if weights is None else weights[token]) * (place >= 0)
        for token, place in enumerate(path)
    ]
    return Update(
        path=path,
        loss=[scale * loss for scale, (loss, _) in zip(scales, pairs, strict=True)],
        by_logprob=[scale * slope for scale, (_, slope) in zip(scales, pairs, strict=True)],
        advantages=advantages,
    )


def grpo(case: Case, *, scale_by_std: bool = True) -> list[float]:
    """A of every token."""
    per_rollout = group_advantages(case.rewards, case.group_ids, scale_by_std=scale_by_std)
    return [per_rollout[rollout] for rollout in case.rollout_ids]


def mix_at(step: int, mix: float, mix_steps: int | None) -> float:
    if mix_steps is None:
        return mix
    return mix * (mix_steps - step) / mix_steps if step < mix_steps else 0.0


def weighed(advantage: float, log_weight: float, mix: float, max_deviation: float) -> float:
    weight = min(max(math.exp(log_weight), 1 - max_deviation), 1 + max_deviation)
    return advantage * ((1 - mix) + mix * weight)


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def rlsd_advantage(
    advantage: float, gap: float, *, mix: float, max_deviation: float, pessimistic: bool
) -> float:
    if advantage == 0:
        return 0.0
    weight = math.exp(gap if advantage > 0 else -gap)
    clipped = min(max(weight, 1 - max_deviation), 1 + max_deviation)
    credit = clipped * advantage
    if pessimistic:
        credit = min(weight * advantage, credit)
    return (1 - mix) * advantage + mix * credit


def rlrt(
    case: Case, *, mix: float, max_deviation: float, gate: str = "correct", scale_by_std: bool
) -> list[float]:
    return [
        weighed(a, -sign(a) * gap(case, token), mix, max_deviation)
        if gate == "all" or case.is_correct[case.rollout_ids[token]]
        else a
        for token, a in enumerate(grpo(case, scale_by_std=scale_by_std))
    ]


def cepo(case: Case, *, mix: float, max_deviation: float, scale_by_std: bool) -> list[float]:
    advantages = []
    for token, a in enumerate(grpo(case, scale_by_std=scale_by_std)):
        roles = [case.roles[role] for role in ("teacher", "wrong[0]")]
        if all(role.has_context[case.rollout_ids[token]] for role in roles):
            evidence = roles[0].logprobs[token] - roles[1].logprobs[token]
            a = weighed(a, sign(a) * evidence, mix, max_deviation)
        advantages.append(a)
    return advantages


def interpolated(values: Sequence[float], level: float) -> float:
    """Linear interpolation between the two neighbours in order."""
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    below = min(math.floor(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def dasd(
    case: Case,
    *,
    beta: float = 0.1,
    quantile: float = 0.2,
    max_gap: float | None = 3.0,
    route: str = "entropy",
    direction: str = "tanh",
    gate: str = "gap",
    min_gap: float = 0.1,
    scale_by_std: bool = True,
) -> list[float]:
    advantages = grpo(case, scale_by_std=scale_by_std)
    for rollout, has_context in enumerate(case.has_context):
        tokens = tokens_of(case, rollout)
        if not has_context or not tokens:
            continue
        # what the route compares with its quantile: entropy, or the place among the tokens
        level = [
            case.entropy[t]
            if route == "entropy"
            else round(math.sin(2 * math.pi * i / len(tokens)), 9)
            for i, t in enumerate(tokens)
        ]
        tau = interpolated(level, quantile)
        spread = statistics.fmean(abs(x - statistics.fmean(level)) for x in level)
        median = statistics.median(abs(gap(case, t)) for t in tokens)
        for token, x in zip(tokens, level, strict=True):
            score = (tau - x) / (spread + 1e-6)
            omega = {
                "tanh": math.tanh(score),
                "hard": sign(tau - x),
                "linear": min(max(score, -1), 1),
            }[direction]
            omega = {"attract": 1, "repel": -1}.get(route, omega)
            relative = gap(case, token) / (median + 1e-6)
            if max_gap is not None:
                relative = min(max(relative, -max_gap), max_gap)
            size = abs(relative)
            omega *= {
                "gap": 1 / (1 + math.exp(1 - min(size, 600.0))),
                "none": 1,
                "magnitude": size,
                "fixed": abs(gap(case, token)) > min_gap,
            }[gate]
            advantages[token] += beta * omega * relative
    return advantages


def hepo_path(case: Case, *, token_share: float | Fraction = 0.2) -> list[int]:
    path = [-1] * len(case.rollout_ids)
    for minibatch in set(case.minibatch_ids):
        tokens = [
            token
            for token, rollout in enumerate(case.rollout_ids)
            if case.minibatch_ids[rollout] == minibatch and case.response_mask[token]
        ]
        count = max(1, math.ceil(Fraction(str(token_share)) * len(tokens)))
        for token in sorted(tokens, key=lambda t: (-case.entropy[t], t))[:count]:
            path[token] = 0
    return path


def with_entropy_bonus(
    case: Case, advantages: list[float], *, alpha: float = 0.4, kappa: float = 2.0
) -> list[float]:
    return [
        a + min(alpha * entropy, abs(a) / kappa)
        for a, entropy in zip(advantages, case.entropy, strict=True)
    ]


def tail_path(case: Case, *, start: Fraction) -> list[int]:
    """What stays when the first floor(start x L) of each rollout's L response tokens leave."""
    path = [-1] * len(case.rollout_ids)
    for rollout in range(len(case.rewards)):
        tokens = tokens_of(case, rollout)
        for token in tokens[math.floor(start * len(tokens)) :]:
            path[token] = 0
    return path


def opd(case: Case, *, coef: float, uses_rewards: bool, scale_by_std: bool) -> list[float]:
    return [
        uses_rewards * a + coef * gap(case, token)
        for token, a in enumerate(grpo(case, scale_by_std=scale_by_std))
    ]


def rlcsd(
    case: Case,
    *,
    tau: float = 0.02,
    beta: float = 1.0,
    mix: float = 0.5,
    delta: float = 0.02,
    eta: float = 1.0,
    scale_by_std: bool = True,
) -> Update:
    advantages = grpo(case, scale_by_std=scale_by_std)
    path, weights = [-1] * len(advantages), [1.0] * len(advantages)
    for rollout, has_context in enumerate(case.has_context):
        roles = [case.roles[f"wrong[{k}]"] for k in (0, 1)]
        wrong = [role.logprobs for role in roles if role.has_context[rollout]]
        if not has_context or not wrong:
            continue
        for token in tokens_of(case, rollout):
            highest = max(role[token] for role in wrong)
            mean = sum(math.exp(role[token] - highest) for role in wrong) / len(wrong)
            evidence = case.teacher_logprobs[token] - highest - math.log(mean)
            u = min(max(beta * mix * math.tanh(evidence / tau), -2.0), 2.0)
            path[token] = int(abs(u) > delta)
            if path[token] == 0:
                continue
            weights[token] = eta
            a = advantages[token]
            advantages[token] = max(a + u, 0.0) if a > 0 else min(a + u, 0.0) if a < 0 else 0.0
    return policy_gradient(case, advantages, path=path, weights=weights, low=0.2, high=0.2)


def distilled_rl(case: Case, *, max_ratio: float = 3.0, scale_by_std: bool = True) -> list[float]:
    advantages = grpo(case, scale_by_std=scale_by_std)
    for rollout in range(len(case.rewards)):
        tokens = tokens_of(case, rollout)
        ratios = [
            min(max(math.exp(gap(case, token)), 1 / max_ratio), max_ratio) for token in tokens
        ]
        for token, ratio in zip(tokens, ratios, strict=True):
            if advantages[token] > 0:
                advantages[token] *= ratio / statistics.geometric_mean(ratios)
    return advantages


@dataclass
class AntiSD:
    """The method with what it remembers: call it once per step, in order."""

    lam: float = 0.5
    warmup_steps: int = 5
    off_below: float = 0.93
    scale_by_std: bool = True
    read: list[float] = field(default_factory=list)  # the teacher's entropies during warm-up
    is_on: bool = True

    def __call__(self, case: Case, step: int) -> list[float]:
        entropies = [
            case.roles["teacher"].entropy[token]
            for rollout, has_context in enumerate(case.has_context)
            if has_context
            for token in tokens_of(case, rollout)
        ]
        advantages = grpo(case, scale_by_std=self.scale_by_std)
        if step < self.warmup_steps:
            self.read += entropies
            return advantages
        if entropies and self.read:
            median, reference = statistics.median(entropies), statistics.median(self.read)
            if median < self.off_below * reference:
                self.is_on = False
            elif median >= reference:
                self.is_on = True
        if not self.is_on:
            return advantages
        return [
            a - self.lam * 0.5 * (softplus(gap(case, token)) - math.log(2))
            for token, a in enumerate(advantages)
        ]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sft(case: Case) -> Update:
    return Update(
        path=case.path,
        loss=[-x if m else 0.0 for x, m in zip(case.logprobs, case.response_mask, strict=True)],
        by_logprob=[-1.0 if m else 0.0 for m in case.response_mask],
    )


def reference_penalty(
    case: Case, *, kl_coef: float, estimator: Literal["k1", "k2", "k3"], entropy_coef: float
) -> Update:
    """What GRPO adds to its surrogate: -entropy_coef H + kl_coef k(ref - logprob)."""
    loss, slopes = [], []
    for token, is_used in enumerate(case.response_mask):
        difference = case.roles["reference"].logprobs[token] - case.logprobs[token]
        x = min(max(difference, -20.0), 20.0)
        value, slope = {
            "k1": (-x, -1.0),
            "k2": (x * x / 2, x),
            "k3": (math.exp(x) - 1 - x, math.exp(x) - 1),
        }[estimator]
        loss.append(is_used * (kl_coef * value - entropy_coef * case.entropy[token]))
        slopes.append(is_used * kl_coef * -slope * (abs(difference) <= 20))
    return Update(path=case.path, loss=loss, by_logprob=slopes)
