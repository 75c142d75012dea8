"""Temporal schedules (arXiv:2605.25381): what a method learns from widens over the run.

Unlike the code, `forking` picks per mini-batch and from 0.2 (arXiv:2506.01939), not per rollout
from 0.01; `entropy_bonus` lowers alpha, not the bonus. The base sets no other section's defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

from omegaconf import OmegaConf, errors

from megasd.algorithms import ALGORITHMS, load_algorithm
from megasd.algorithms.base import Algorithm, Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.reduce import Reduction
from megasd.losses.selection import only_highest_entropy, only_tail, with_entropy_bonus
from megasd.types import (
    Credit,
    PerRollout,
    ResponseBatch,
    RolloutIndex,
    RolloutMask,
    StudentOutput,
    TokenLoss,
)


@dataclass(frozen=True, kw_only=True)
class Temporal(Algorithm):
    """Another credit method, `base`, of whose credit all counts only from `steps` on. Before:

    - tail_first: the first floor(start x L) of a rollout's L tokens are out; start falls to 0.
    - forking: of a mini-batch the share of highest old entropy is in; the share grows to 1.
    - entropy_bonus: A_hat = A + min(alpha H, |A| / kappa), H in nats; alpha falls to 0.

    Linear in the step. What is out leaves the denominators; `reduction` is always the base's.
    """

    paper: ClassVar[str] = "arXiv:2605.25381"
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "base": "paper",
        "options": "megasd",
        "schedule": "code",
        "steps": "megasd (the code: 0.8 of the run)",
        "start": "code",
        "share": "arXiv:2506.01939",
        "alpha": "code",
        "kappa": "code",
    }

    reduction: Reduction | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    base: str = "grpo"
    options: dict[str, Any] = field(default_factory=dict)  # the base's fields
    schedule: Literal["tail_first", "forking", "entropy_bonus"] = "tail_first"
    steps: int = 80
    start: float = 0.99  # this, share and alpha at step 0
    share: float = 0.2
    alpha: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("steps", self.steps >= 1, "1 or more"),
            ("start", 0 <= self.start < 1, "0 or more and below 1"),
            ("share", 0 < self.share <= 1, "above 0 and at most 1"),
            ("alpha", self.alpha >= 0, "0 or more"),
            ("kappa", self.kappa > 1, "above 1, else the bonus could undo a negative advantage"),
        ):
            if not holds:
                raise ValueError(f"algorithm.{name} must be {rule}, not {getattr(self, name)}")
        if self.reduction not in (None, self.method.reduction):
            raise ValueError("algorithm.reduction is the base's: set algorithm.options.reduction")
        object.__setattr__(self, "reduction", self.method.reduction)

    @cached_property
    def method(self) -> PolicyGradient:
        """The base with its preset and `options`; a ValueError says which of them is wrong."""
        base = load_algorithm(self.base) if self.base in ALGORITHMS else None
        if base is None or not issubclass(base.cls, PolicyGradient):
            raise ValueError(f"algorithm.base: {self.base!r} is no credit method; grpo is one")
        try:
            section = OmegaConf.merge(base.cls, base.preset, self.options)
            return cast(PolicyGradient, OmegaConf.to_object(section))
        except errors.OmegaConfBaseException as error:
            key = f"algorithm.options.{error.full_key or ''}".rstrip(".")
            raise ValueError(f"{key}: {str(error).splitlines()[0]} ({self.base})") from None
        except ValueError as error:
            raise ValueError(str(error).replace("algorithm.", "algorithm.options.")) from None

    @property
    def needs(self) -> Needs:
        needs = self.method.needs
        return needs if self.schedule == "tail_first" else replace(needs, entropy=True)

    def rows_to_keep(
        self, rewards: PerRollout, group_ids: RolloutIndex, refills: int
    ) -> RolloutMask:
        return self.method.rows_to_keep(rewards, group_ids, refills)

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        return self.method.rows_to_score(batch, has_context, step)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        credit = self.method.assign_credit(batch, step)
        left = max(0.0, 1 - step / self.steps)
        match self.schedule:
            case "tail_first":
                return only_tail(credit, batch, start=self.start * left)
            case "forking":
                return only_highest_entropy(credit, batch, share=1 - (1 - self.share) * left)
            case "entropy_bonus":
                return with_entropy_bonus(credit, batch, alpha=self.alpha * left, kappa=self.kappa)

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        return self.method.token_loss(student, batch, credit)
