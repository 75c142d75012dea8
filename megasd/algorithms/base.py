"""What the loop asks of a method, and nothing else. An algorithm is arithmetic.

A method is a frozen dataclass: its fields are its config section, its class variables say what
must run before it. Adding one is a file, a test, a config and a line in the registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

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
    """Passes and inputs that must exist before credit is assigned."""

    rewards: bool = True  # False: the verifiers are not called
    solutions: bool = False  # responses are the dataset's solutions, nothing is sampled
    teachers: tuple[str, ...] = ()  # roles whose log-probs are needed
    entropy: bool = False  # the student's, at the old weights
    teacher_entropy: bool = False


class Algorithm(Protocol):
    """A method of docs/algorithms: credit once per batch, loss once per micro-batch."""

    needs: ClassVar[Needs]
    paper: ClassVar[str]
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]]
    """What the paper sets in other sections of the config: {"teacher": {"weights": ...}}."""

    @property
    def reduction(self) -> Reduction:
        """How token losses become one number; the denominators are of the global mini-batch."""
        ...

    def rows_to_keep(
        self, rewards: PerRollout, group_ids: RolloutIndex, refills: int
    ) -> RolloutMask:
        """The rollouts to learn from, whole groups; for the others new prompts are sampled.

        `refills` counts the rounds of this step before; a method must end by keeping all.
        """
        ...

    def rows_to_score(self, batch: ResponseBatch, step: int) -> RolloutMask:
        """The rollouts whose teacher pass can change the update. Called with rewards only."""
        ...

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        """Advantage, weight and path of every response token. Without gradient."""
        ...

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        """Loss of every token of a micro-batch; `batch.old_logprobs` is always set here."""
        ...
