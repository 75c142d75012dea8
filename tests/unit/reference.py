"""The methods again, written the slow way: float64, plain Python, one rollout after the other.

The arithmetic shares no line with the package, so that agreement means something. At the end,
random batches to compare on, and what it takes to run the package on them.
"""

import math
import random
import statistics
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megasd.losses import reduce
from megasd.types import Credit, ResponseBatch, StudentOutput, TeacherScores


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


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch as lists, every number exact in float32; per rollout or per token."""

    rewards: list[float]
    group_ids: list[int]
    has_context: list[bool]
    rollout_ids: list[int]
    response_mask: list[bool]
    logprobs: list[float]
    old_logprobs: list[float]
    teacher_logprobs: list[float]
    entropy: list[float]
    max_response_tokens: int

    @property
    def path(self) -> list[int]:
        return [0 if used else -1 for used in self.response_mask]

    @property
    def lengths(self) -> list[int]:
        used = [r for r, m in zip(self.rollout_ids, self.response_mask, strict=True) if m]
        return [used.count(rollout) for rollout in range(len(self.rewards))]

    def batch(self) -> ResponseBatch:
        old_logprobs = torch.tensor(self.old_logprobs)
        return ResponseBatch(
            rewards=torch.tensor(self.rewards),
            group_ids=torch.tensor(self.group_ids),
            minibatch_ids=torch.zeros(len(self.rewards), dtype=torch.long),
            rollout_ids=torch.tensor(self.rollout_ids),
            response_mask=torch.tensor(self.response_mask),
            max_response_tokens=self.max_response_tokens,
            rollout_logprobs=old_logprobs,
            old_logprobs=old_logprobs,
            teachers={
                "teacher": TeacherScores(
                    has_context=torch.tensor(self.has_context),
                    logprobs=torch.tensor(self.teacher_logprobs),
                )
            },
        )


def random_case(seed: int) -> Case:
    """Groups of 1 to 5 in any order, equal rewards, single tokens, holes, gaps up to 50."""
    rng = random.Random(seed)
    rollouts = [
        (group, reward)
        for group in range(rng.randint(1, 4))
        for reward in (
            [rng.choice([0.1, 1.0])] * rng.randint(1, 5)
            if rng.random() < 0.25
            else [rng.choice([0.0, 0.1, 1.0, rng.random()]) for _ in range(rng.randint(1, 5))]
        )
    ]
    rng.shuffle(rollouts)
    lengths = [rng.choice([1, rng.randint(1, 12)]) for _ in rollouts]
    rollout_ids = [index for index, length in enumerate(lengths) for _ in range(length)]
    has_context = [rng.random() < 0.8 for _ in rollouts]
    old_logprobs = [float32(rng.choice([-4, -4, -4, -60]) * rng.random()) for _ in rollout_ids]
    gaps = [rng.choice([0.0, rng.gauss(0, 0.3), rng.gauss(0, 3), 50.0, -50.0]) for _ in rollout_ids]
    return Case(
        rewards=[float32(reward) for _, reward in rollouts],
        group_ids=[10 * group + 3 for group, _ in rollouts],
        has_context=has_context,
        rollout_ids=rollout_ids,
        response_mask=[rng.random() < 0.9 for _ in rollout_ids],
        logprobs=[
            float32(old + rng.choice([0, 0.1, 1, 30]) * rng.gauss(0, 1)) for old in old_logprobs
        ],
        old_logprobs=old_logprobs,
        teacher_logprobs=[
            float32(old + gap) if has_context[rollout] else old
            for old, gap, rollout in zip(old_logprobs, gaps, rollout_ids, strict=True)
        ],
        entropy=[float32(3 * rng.random()) for _ in rollout_ids],
        max_response_tokens=12,
    )


class FakeStudent(StudentOutput):
    """A forward pass whose outputs are given."""

    def __init__(self, logprobs: torch.Tensor, entropy: torch.Tensor | None = None) -> None:
        self._logprobs, self._entropy = logprobs, entropy

    @property
    def logprobs(self) -> torch.Tensor:
        return self._logprobs

    @property
    def entropy(self) -> torch.Tensor:
        assert self._entropy is not None, "nobody asked for the entropy"
        return self._entropy


def update_weights(
    reduction: reduce.Reduction, batch: ResponseBatch, credit: Credit
) -> torch.Tensor:
    """What each token's loss is multiplied by when the whole batch is one mini-batch."""
    return credit.token_weights * reduce.reduction_weights(
        reduction,
        credit.path,
        batch.rollout_ids,
        num_rollouts=batch.num_rollouts,
        max_response_tokens=batch.max_response_tokens,
    )
