"""Random batches with every oddity, and what it takes to run a method on them."""

import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasd.algorithms.base import Needs
from megasd.losses import reduce
from megasd.losses.divergence import divergence_entries
from megasd.types import (
    Credit,
    DivergenceKind,
    ResponseBatch,
    StudentOutput,
    Support,
    TeacherHidden,
    TeacherScores,
)

VOCABULARY = 12
SUCCESS_THRESHOLD = 1.0


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass(frozen=True, kw_only=True)
class Role:
    """One teacher role's reading: per rollout, per token."""

    has_context: list[bool]
    logprobs: list[float]  # the old ones on rollouts without context
    entropy: list[float]
    cross_entropy: list[float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch as lists, every number exact in float32; per rollout or per token."""

    rewards: list[float]
    group_ids: list[int]
    minibatch_ids: list[int]
    rollout_ids: list[int]
    response_mask: list[bool]
    logprobs: list[float]
    old_logprobs: list[float]
    entropy: list[float]
    roles: Mapping[str, Role]  # teacher, wrong[0], wrong[1], reference
    student_logits: list[list[float]]  # [N, V], current weights
    teacher_logits: list[list[float]]  # [N, V], role `teacher`
    ids: list[list[int]]  # [N, K] different vocabulary ids of each token
    max_response_tokens: int

    @property
    def has_context(self) -> list[bool]:
        return self.roles["teacher"].has_context

    @property
    def teacher_logprobs(self) -> list[float]:
        return self.roles["teacher"].logprobs

    @property
    def is_correct(self) -> list[bool]:
        return [reward >= SUCCESS_THRESHOLD for reward in self.rewards]

    @property
    def path(self) -> list[int]:
        return [0 if used else -1 for used in self.response_mask]

    @property
    def lengths(self) -> list[int]:
        used = [r for r, m in zip(self.rollout_ids, self.response_mask, strict=True) if m]
        return [used.count(rollout) for rollout in range(len(self.rewards))]

    def batch(self, needs: Needs | None = None) -> ResponseBatch:
        """What the loop hands to a method that has these needs; by default role `teacher`."""
        needs = Needs(teachers=("teacher",)) if needs is None else needs
        reads_entropy = needs.entropy or needs.entropy_beside_teacher
        old_logprobs = torch.tensor(self.old_logprobs)
        teacher_logits = torch.tensor(self.teacher_logits)
        support = hidden = None
        if needs.support is not None:
            ids = torch.tensor(self.ids)
            logprobs = teacher_logits.log_softmax(-1).gather(1, ids)
            support = Support(
                ids=ids, teacher_logprobs=None if needs.support == "samples" else logprobs
            )
        if needs.teacher_hidden:
            hidden = TeacherHidden(hidden=teacher_logits, weight=torch.eye(VOCABULARY))
        return ResponseBatch(
            rewards=torch.tensor(self.rewards),
            is_correct=torch.tensor(self.is_correct),
            group_ids=torch.tensor(self.group_ids),
            minibatch_ids=torch.tensor(self.minibatch_ids),
            rollout_ids=torch.tensor(self.rollout_ids),
            response_mask=torch.tensor(self.response_mask),
            max_response_tokens=self.max_response_tokens,
            rollout_logprobs=old_logprobs,
            old_logprobs=old_logprobs,
            entropy=torch.tensor(self.entropy) if reads_entropy else None,
            teachers={role: self._teacher(self.roles[role], needs) for role in needs.teachers},
            support=support,
            teacher_hidden=hidden,
        )

    def _teacher(self, role: Role, needs: Needs) -> TeacherScores:
        return TeacherScores(
            has_context=torch.tensor(role.has_context),
            logprobs=torch.tensor(role.logprobs),
            entropy=torch.tensor(role.entropy) if needs.teacher_entropy else None,
            cross_entropy=torch.tensor(role.cross_entropy) if needs.cross_entropy else None,
        )

    def student(self, batch: ResponseBatch) -> "FakeStudent":
        return FakeStudent(
            torch.tensor(self.logprobs, requires_grad=True),
            torch.tensor(self.entropy),
            logits=torch.tensor(self.student_logits, requires_grad=True),
            batch=batch,
        )


def random_case(seed: int) -> Case:
    """Groups of 1 to 5 in any order, equal rewards, single tokens, holes, gaps up to 50."""
    rng = random.Random(seed)
    rollouts = [
        (group, reward)
        for group in range(rng.randint(1, 4))
        for reward in (
            [rng.choice([0.0, 0.1, 1.0])] * rng.randint(1, 5)
            if rng.random() < 0.25
            else [rng.choice([0.0, 0.1, 1.0, rng.random()]) for _ in range(rng.randint(1, 5))]
        )
    ]
    rng.shuffle(rollouts)
    lengths = [rng.choice([1, rng.randint(1, 12)]) for _ in rollouts]
    rollout_ids = [index for index, length in enumerate(lengths) for _ in range(length)]
    old_logprobs = [float32(rng.choice([-4, -4, -4, -60]) * rng.random()) for _ in rollout_ids]
    size = rng.choice([1, 3, VOCABULARY])
    return Case(
        rewards=[float32(reward) for _, reward in rollouts],
        group_ids=[10 * group + 3 for group, _ in rollouts],
        minibatch_ids=[group % 2 for group, _ in rollouts],
        rollout_ids=rollout_ids,
        response_mask=[rng.random() < 0.9 for _ in rollout_ids],
        logprobs=[
            float32(old + rng.choice([0, 0.1, 1, 30]) * rng.gauss(0, 1)) for old in old_logprobs
        ],
        old_logprobs=old_logprobs,
        entropy=[float32(rng.choice([3 * rng.random(), 0.0, 1.5])) for _ in rollout_ids],
        roles={
            role: _random_role(rng, share, rollout_ids, old_logprobs)
            for role, share in (
                ("teacher", 0.8),
                ("wrong[0]", 0.8),
                ("wrong[1]", 0.5),
                ("reference", 1.0),
            )
        },
        student_logits=_random_logits(rng, rollout_ids),
        teacher_logits=_random_logits(rng, rollout_ids),
        ids=[rng.sample(range(VOCABULARY), size) for _ in rollout_ids],
        max_response_tokens=12,
    )


def _random_role(
    rng: random.Random, share: float, rollout_ids: Sequence[int], old_logprobs: Sequence[float]
) -> Role:
    has_context = [rng.random() < share for _ in range(rollout_ids[-1] + 1)]
    gaps = [rng.choice([0.0, rng.gauss(0, 0.3), rng.gauss(0, 3), 50.0, -50.0]) for _ in rollout_ids]
    read = [has_context[rollout] for rollout in rollout_ids]
    return Role(
        has_context=has_context,
        logprobs=[
            float32(old + gap) if is_read else old
            for old, gap, is_read in zip(old_logprobs, gaps, read, strict=True)
        ],
        entropy=[float32(3 * rng.random()) if is_read else 0.0 for is_read in read],
        cross_entropy=[float32(5 * rng.random()) if is_read else 0.0 for is_read in read],
    )


def _random_logits(rng: random.Random, rollout_ids: Sequence[int]) -> list[list[float]]:
    return [
        [float32(rng.choice([1, 1, 8]) * rng.gauss(0, 1)) for _ in range(VOCABULARY)]
        for _ in rollout_ids
    ]


class FakeStudent(StudentOutput):
    """A forward pass whose outputs are given; distributions come from dense `logits` [N, V]."""

    def __init__(
        self,
        logprobs: Tensor,
        entropy: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        batch: ResponseBatch | None = None,
    ) -> None:
        self._logprobs, self._entropy, self.logits, self._batch = logprobs, entropy, logits, batch

    @property
    def vocab_size(self) -> int:
        return VOCABULARY if self.logits is None else self.logits.shape[1]

    @property
    def logprobs(self) -> Tensor:
        return self._logprobs

    @property
    def entropy(self) -> Tensor:
        assert self._entropy is not None, "nobody asked for the entropy"
        return self._entropy

    @property
    def support_logprobs(self) -> Tensor:
        assert self.logits is not None
        assert self._batch is not None
        assert self._batch.support is not None, "nobody asked for a support"
        return self.logits.log_softmax(-1).gather(1, self._batch.support.ids)

    def full_divergence(
        self, kind: DivergenceKind, *, alpha: float, entry_clip: float | None
    ) -> Tensor:
        assert self.logits is not None
        assert self._batch is not None
        teacher = self._batch.teacher_hidden
        assert teacher is not None, "nobody asked for the teacher's hidden states"
        dense = (teacher.hidden @ teacher.weight.T).log_softmax(-1)
        entries, _ = divergence_entries(
            kind, self.logits.log_softmax(-1), dense, alpha=alpha, entry_clip=entry_clip
        )
        return entries.sum(-1)


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
