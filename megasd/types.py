"""The project's nouns: every value that two rooms exchange is defined here, once.

Shape letters, used in every docstring: R rollouts of the batch, G rollouts per group, N response
tokens of all R rollouts laid end to end ("response space"), K entries of a truncated vocabulary.

Response space is global: the per-token values of the whole batch stand on every rank, so an
algorithm needs no collective and every denominator is the global one (docs/decisions/0001).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

PerToken = Float[Tensor, " N"]
PerRollout = Float[Tensor, " R"]
TokenMask = Bool[Tensor, " N"]
TokenIndex = Int[Tensor, " N"]
RolloutMask = Bool[Tensor, " R"]
RolloutIndex = Int[Tensor, " R"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response with its provenance."""

    prompt: Prompt
    group_id: int  # rollouts of one prompt in one step share it
    sample: int  # 0 .. group_size - 1 within the group
    token_ids: np.ndarray  # [T] int64, the end-of-sequence token included when it was sampled
    logprobs: np.ndarray | None  # [T] float32, of what was really sampled; None: not sampled
    text: str  # decoded without special tokens
    finish_reason: FinishReason
    policy_version: int  # optimizer steps behind the weights that sampled it


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier said of one rollout. With an `error` the reward means nothing."""

    reward: float = 0.0
    error: str | None = None  # the verifier raised, hung or died: counted, never a silent 0
    feedback: str = ""  # what a teacher may read (algorithms.md section 2, `feedback`)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One context plus the response: what one forward pass reads of a rollout."""

    prompt_ids: np.ndarray  # [P] int64: the plain prompt, or the prompt with privileged context
    response_ids: np.ndarray  # [T] int64: the same ids in every view of a rollout

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Scores(NamedTuple):
    """Forward-only results in response space, on every rank."""

    logprobs: PerToken
    entropy: PerToken  # nats, of the full next-token distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """One teacher role's reading of the batch.

    A rollout without context, or one that `rows_to_score` left out, agrees with the student:
    its log-probs are the old ones, so `teacher_gap` is exactly 0 there.
    """

    has_context: RolloutMask
    logprobs: PerToken
    entropy: PerToken | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseBatch:
    """R scored rollouts in response space: student and teacher line up token by token.

    `at` cuts a micro-batch: its per-token fields shrink, its per-rollout fields stay whole.
    """

    rewards: PerRollout
    group_ids: RolloutIndex
    minibatch_ids: RolloutIndex  # the optimizer step that each rollout belongs to, from 0
    rollout_ids: TokenIndex  # the rollout of each token, an index into the per-rollout fields
    response_mask: TokenMask  # True where the policy produced the token
    max_response_tokens: int
    rollout_logprobs: PerToken | None = None  # the engine's; None: not sampled (sft)
    old_logprobs: PerToken | None = None  # None: one mini-batch, taken from its own forward pass
    entropy: PerToken | None = None  # nats, old weights
    teachers: Mapping[str, TeacherScores] = field(default_factory=dict)  # roles that read something

    @property
    def num_rollouts(self) -> int:
        return self.rewards.shape[0]

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
                role: replace(t, logprobs=t.logprobs[tokens], entropy=cut(t.entropy))
                for role, t in self.teachers.items()
            },
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

    def at(self, tokens: TokenIndex) -> "Credit":
        return Credit(*(values[tokens] for values in self))


class TokenLoss(NamedTuple):
    """A loss before reduction. `metrics` are averaged over the tokens of the update."""

    loss: PerToken
    metrics: Mapping[str, PerToken]


class StudentOutput(ABC):
    """One differentiable forward pass in response space; how the vocabulary is cut is hidden."""

    @property
    @abstractmethod
    def logprobs(self) -> PerToken:
        """Log-probability of each response token, with gradient."""

    @property
    @abstractmethod
    def entropy(self) -> PerToken:
        """Entropy in nats of the full next-token distribution, with gradient."""


Messages = Sequence[Mapping[str, str]]
