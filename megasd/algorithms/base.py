"""What the loop asks of a method, and nothing else. An algorithm is arithmetic.

A method is a frozen dataclass: its fields are its config section, `needs` says what must run
before it. Adding one is a file, a test, a config and a line in the registry.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from megasd.losses.reduce import Reduction
from megasd.types import (
    Credit,
    PerRollout,
    ResponseBatch,
    RolloutIndex,
    RolloutMask,
    StudentOutput,
    TokenLoss,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Passes and inputs that must exist before credit is assigned.

    Roles of teachers: `teacher` reads context.sources; `wrong[k]` the k-th incorrect sibling;
    `reference` the plain prompt, under the initial weights.
    """

    rewards: bool = True  # False: the loss looks at no reward
    groups: bool = False  # compares the rollouts of a prompt in other ways than by reward
    solutions: bool = False  # responses are the dataset's solutions, nothing is sampled
    teachers: tuple[str, ...] = ()  # roles that read the responses
    old_logprobs: bool = True  # before the update, to compare teachers with
    entropy: bool = False  # the student's, at the old weights
    entropy_beside_teacher: bool = (
        False  # the same, in batches that a teacher has read something of
    )
    teacher_entropy: bool = False
    support: Literal["student", "teacher", "samples"] | None = None  # whose ids
    support_size: int = 0  # K ids per token
    cross_entropy: bool = False  # the old student's, on the support
    teacher_hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """A method of docs/methods.md: credit once per batch, loss once per micro-batch."""

    paper: ClassVar[str]
    # What the method sets in other sections of the config: {"teacher": {"weights": ...}}.
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    # Where each default stands: "paper", "code", or "megasd" (decided here), by key of the config.
    sources: ClassVar[Mapping[str, str]]

    reduction: Reduction = "token_mean"  # the denominators are of the global mini-batch

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    def rows_to_keep(
        self, rewards: PerRollout, group_ids: RolloutIndex, refills: int
    ) -> RolloutMask:
        """The rollouts to learn from, whole groups; for the others new prompts are sampled.

        `refills` counts the rounds of this step before; a method must end by keeping all.
        """
        return torch.ones_like(rewards, dtype=torch.bool)

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        """The rollouts whose teacher passes can change the update. Called with rewards only."""
        return torch.ones_like(batch.is_correct)

    @abstractmethod
    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        """Advantage, weight and path of every response token. Without gradient."""

    @abstractmethod
    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        """Loss of every token of a micro-batch; `batch.old_logprobs` is always set here."""
