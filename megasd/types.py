"""The project's nouns: every value that two rooms exchange is defined here, once.

Shape letters, used in every docstring: R rollouts of the batch, G rollouts per group, N response
tokens of all R rollouts laid end to end ("response space"), K entries of a truncated vocabulary.

Response space is global: the per-token values of the whole batch stand on every rank, so an
algorithm needs no collective and every denominator is the global one (docs/decisions/0001).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PerToken = Float[Tensor, " N"]
PerRollout = Float[Tensor, " R"]
PerTokenAndId = Float[Tensor, "N K"]
TokenMask = Bool[Tensor, " N"]
TokenIndex = Int[Tensor, " N"]
RolloutMask = Bool[Tensor, " R"]
RolloutIndex = Int[Tensor, " R"]

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the dataset, checked and tokenised."""

    index: int  # row number in the whole dataset: the row's identity over epochs and restarts
    messages: tuple[Mapping[str, str], ...]  # chat messages, the last one from the user
    token_ids: np.ndarray  # [P] int64, generation header included
    answer: str | None = None
    solution: str | None = None
    verifier: str = "exact"
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what the row's verifier needs
    where: str = ""  # "file.jsonl:12", for messages

    @property
    def name(self) -> str:
        """For messages."""
        return self.where or f"prompt {self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response with its provenance."""

    prompt: Prompt
    group_id: int  # rollouts of one prompt in one step share it
    sample: int  # 0 .. group_size - 1 within the group
    token_ids: np.ndarray  # [T] int32, the end-of-sequence token included when it was sampled
    logprobs: np.ndarray | None  # [T] float32, of what was really sampled; None: not sampled
    text: str  # decoded without special tokens
    finish_reason: FinishReason
    policy_version: int  # optimizer steps behind the weights that sampled it

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.prompt.name} sample {self.sample}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier said of one rollout. With an `error` the reward means nothing."""

    reward: float = 0.0
    error: str | None = None  # the verifier raised, hung or died: counted, never a silent 0
    feedback: str = ""  # what a teacher may read (context source `feedback`)

    def is_right(self, success_threshold: float) -> bool:
        """Judged, and the reward reaches `reward.success_threshold`."""
        return self.error is None and self.reward >= success_threshold

    def is_wrong(self, success_threshold: float) -> bool:
        """Judged, and it does not."""
        return self.error is None and self.reward < success_threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One context plus the response: what one forward pass reads of a rollout."""

    prompt_ids: np.ndarray  # [P] int64: the plain prompt, or the prompt with privileged context
    response_ids: np.ndarray  # [T] int32: the same ids in every view of a rollout

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """K vocabulary ids per response token, at which student and teacher are compared.

    Log-probs are normalised over the FULL vocabulary. These values never travel: of the whole
    batch a rank holds the n tokens that it reads itself, and `index` [N] names each token's row.
    Index -1 is the last row, which stands for every token that has none. Of each row a rank may
    hold some columns (policy/rows.py): then `num_ids` is K.
    """

    ids: Int[Tensor, "n K"]
    teacher_logprobs: Float[Tensor, "n K"] | None = None  # None: not known, as of sampled ids
    index: TokenIndex | None = None  # None: row i is token i
    num_ids: int | None = None  # None: `ids` has them all

    def at(self, tokens: TokenIndex) -> "Support":
        rows = tokens if self.index is None else self.index[tokens]
        logprobs = None if self.teacher_logprobs is None else self.teacher_logprobs[rows]
        ids = self.ids[rows].long()
        return Support(ids=ids, teacher_logprobs=logprobs, num_ids=self.num_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHidden:
    """The teacher's final hidden states: its full distribution at the price of a top-k.

    Rows as in `Support`, of which a rank may hold some of the H columns; `weight` is this rank's
    share of the head that made them.
    """

    hidden: Float[Tensor, "n H"]
    weight: Float[Tensor, "V_local H"]
    index: TokenIndex | None = None

    def at(self, tokens: TokenIndex) -> "TeacherHidden":
        rows = tokens if self.index is None else self.index[tokens]
        return TeacherHidden(hidden=self.hidden[rows], weight=self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What a forward-only pass is asked for beside log-probs and entropy."""

    top_k: int = 0  # the K most likely ids and their log-probs -> Scores.support
    samples: int = 0  # or as many ids drawn from the distribution -> Scores.support
    seed: tuple[int, ...] = (0,)  # of the samples
    support: Support | None = None  # or the log-probs at these ids -> Scores.support
    cross_entropy: bool = False  # instead: of these, under the teacher that `support` is of
    hidden: bool = False  # final hidden states -> Scores.hidden

    @property
    def leaves_rows(self) -> bool:
        """Whether the ranks keep rows of their own tokens, which only an index finds."""
        support = self.support is not None and not self.cross_entropy
        return bool(self.top_k or self.samples or support or self.hidden)


class Scores(NamedTuple):
    """What a forward-only pass read of the batch: [N] values on every rank, the others here."""

    logprobs: PerToken
    entropy: PerToken  # nats, of the full next-token distribution
    cross_entropy: PerToken | None = None
    support: Support | None = None
    hidden: TeacherHidden | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """One teacher role's reading of the batch.

    A rollout without context, or one that `rows_to_score` left out, agrees with the student:
    its log-probs are the old ones, so `teacher_gap` is exactly 0 there.
    """

    has_context: RolloutMask  # and was read
    logprobs: PerToken
    entropy: PerToken | None = None  # nats; 0 without context
    # H^x_t = -sum_a T(a) log S(a) of the old student on the support, nats; 0 without context.
    cross_entropy: PerToken | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseBatch:
    """R scored rollouts in response space: student and teacher line up token by token.

    `at` cuts a micro-batch: its per-token fields shrink, its per-rollout fields stay whole.
    """

    rewards: PerRollout
    is_correct: RolloutMask  # `Verdict.is_right`
    group_ids: RolloutIndex
    minibatch_ids: RolloutIndex  # the optimizer step that each rollout belongs to, from 0
    rollout_ids: TokenIndex  # the rollout of each token, an index into the per-rollout fields
    response_mask: TokenMask  # True where the policy produced the token
    max_response_tokens: int
    rollout_logprobs: PerToken | None = None  # the engine's; None: not sampled (sft)
    old_logprobs: PerToken | None = None  # None: one mini-batch, taken from its own forward pass
    entropy: PerToken | None = None  # nats, old weights
    teachers: Mapping[str, TeacherScores] = field(default_factory=dict)  # roles that read something
    roles: Collection[str] | None = None  # of teachers, that may be asked for; None: any
    support: Support | None = None  # of role `teacher`
    teacher_hidden: TeacherHidden | None = None  # of role `teacher`
    # The data-parallel rank that reads each rollout in every pass; None: any, pass by pass.
    owners: RolloutIndex | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # `Credit.memory` of the step before

    @property
    def num_rollouts(self) -> int:
        return self.rewards.shape[0]

    def has_context(self, role: str = "teacher") -> RolloutMask:
        """The rollouts that this role has read after a privileged context."""
        self._check_role(role)
        if role not in self.teachers:
            return torch.zeros_like(self.is_correct)
        return self.teachers[role].has_context

    def teacher_gap(self, role: str = "teacher") -> PerToken:
        """D = teacher - old log-probs; exactly 0 where the role has read nothing."""
        self._check_role(role)
        if role not in self.teachers:
            return torch.zeros(len(self.rollout_ids), device=self.rollout_ids.device)
        assert self.old_logprobs is not None  # promised where needs.old_logprobs
        gap = self.teachers[role].logprobs - self.old_logprobs
        return torch.where(self.has_context(role)[self.rollout_ids], gap, 0.0)

    def _check_role(self, role: str) -> None:
        """A role that nobody was asked to play would look like one that agrees with the student."""
        if self.roles is not None and role not in self.roles:
            raise ValueError(
                f"the method looks at what teacher role {role!r} has read, and its `needs` do not "
                f"name it: add it to Needs(teachers={tuple(self.roles)})"
            )

    def at(self, tokens: TokenIndex) -> "ResponseBatch":
        """The same batch restricted to `tokens`, in that order."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[tokens]

        return replace(
            self,
            rollout_ids=self.rollout_ids[tokens],
            response_mask=self.response_mask[tokens],
            rollout_logprobs=cut(self.rollout_logprobs),
            old_logprobs=cut(self.old_logprobs),
            entropy=cut(self.entropy),
            teachers={
                role: replace(
                    t,
                    logprobs=t.logprobs[tokens],
                    entropy=cut(t.entropy),
                    cross_entropy=cut(t.cross_entropy),
                )
                for role, t in self.teachers.items()
            },
            support=None if self.support is None else self.support.at(tokens),
            teacher_hidden=None if self.teacher_hidden is None else self.teacher_hidden.at(tokens),
        )


class Credit(NamedTuple):
    """What `assign_credit` decides once per batch; no gradient flows through it.

    `path` names the average that a token belongs to (0, 1, ...); -1 takes it out of the update
    and out of every denominator. A token whose weight is 0 counts in its path's denominator but
    adds nothing: a rollout of such tokens only is never run.
    """

    advantages: PerToken
    token_weights: PerToken
    path: TokenIndex
    metrics: Mapping[str, float] = {}  # about the batch, logged as credit/...
    memory: Mapping[str, Tensor] = {}  # what the next step finds in `ResponseBatch.memory`

    def at(self, tokens: TokenIndex) -> "Credit":
        return Credit(self.advantages[tokens], self.token_weights[tokens], self.path[tokens])


class TokenLoss(NamedTuple):
    """A loss before reduction. `metrics` are averaged over the tokens of the update."""

    loss: PerToken
    metrics: Mapping[str, PerToken]


class StudentOutput(ABC):
    """One differentiable forward pass in response space; how the vocabulary is cut is hidden."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, padding left out."""

    @property
    @abstractmethod
    def logprobs(self) -> PerToken:
        """Log-probability of each response token, with gradient."""

    @property
    @abstractmethod
    def entropy(self) -> PerToken:
        """Entropy in nats of the full next-token distribution, with gradient."""

    @property
    @abstractmethod
    def support_logprobs(self) -> PerTokenAndId:
        """Log-probs at `batch.support.ids`, with gradient."""

    @abstractmethod
    def full_divergence(
        self, kind: DivergenceKind, *, alpha: float, entry_clip: float | None
    ) -> PerToken:
        """Divergence to the distribution of `batch.teacher_hidden`, all V ids, with gradient."""


Messages = Sequence[Mapping[str, str]]
