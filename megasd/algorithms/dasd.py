"""DASD (arXiv:2605.22263): pulled to the teacher where the student is sure, pushed off elsewhere.

The teacher is the policy itself, reading the response after a solution. A token's entropy within
its own rollout sets the direction, so about 1 - `quantile` of the tokens are pushed away: that is
the method. It can flip the verifier's sign, and it learns where A = 0 too.

Decided here: beta, which the paper never prints; the cap on Dn (`max_gap: null` is the printed
form: most gaps are near 0, so their median is tiny); the threshold of `gate: fixed`; and the curve
of `route: position`, which the paper calls a sinusoidal relative position.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.per_rollout import quantile, router, sinusoidal_position
from megasd.types import Credit, PerToken, ResponseBatch, RolloutMask


@dataclass(frozen=True, kw_only=True)
class DASD(PolicyGradient):
    """Eq. 4, Algorithm 1: A_hat = A + beta z gate Dn, statistics over each rollout's own tokens.

    Dn = D / (median |D| + 1e-6), capped at +-`max_gap`, D = teacher - old log-probs, no gradient;
    gate = sigmoid(|Dn| - 1); z = tanh((tau - H) / (s + 1e-6)), H the old entropy in nats, tau its
    `quantile`, s its mean absolute deviation. Without context D = 0: GRPO.
    """

    paper: ClassVar[str] = "arXiv:2605.22263"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "live"},
        "context": {"sources": ["solution"]},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "paper (eq. 5)",
        "scale_by_std": "paper",
        "clip": "DAPO (arXiv:2503.14476)",
        "beta": "megasd",
        "quantile": "paper",
        "max_gap": "megasd (the paper: null)",
        "route": "paper (eq. 4)",
        "direction": "paper (eq. 4)",
        "gate": "paper (eq. 4)",
        "min_gap": "megasd",
        "teacher.weights": "paper",
        "context.sources": "paper",
    }

    beta: float = 0.1  # 0 is GRPO
    quantile: float = 0.2  # below this quantile of its rollout's entropy a token is pulled
    max_gap: float | None = 3.0  # cap on |Dn|; null: none, as printed
    route: Literal["entropy", "position", "attract", "repel"] = "entropy"  # attract: z = 1
    direction: Literal["tanh", "hard", "linear"] = "tanh"  # shape of z
    gate: Literal["gap", "none", "magnitude", "fixed"] = "gap"  # magnitude: |Dn|
    min_gap: float = 0.1  # nats; gate fixed: 1 where |D| is above, else 0

    def __post_init__(self) -> None:
        for name in ("beta", "min_gap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"algorithm.{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"algorithm.quantile must be between 0 and 1, not {self.quantile}")
        if self.max_gap is None:
            warnings.warn("algorithm.max_gap: null may collapse the run; 3 is safer", stacklevel=2)
        elif not self.max_gap > 0:
            raise ValueError(f"algorithm.max_gap must be above 0, or null, not {self.max_gap}")

    @property
    def needs(self) -> Needs:
        return Needs(
            teachers=("teacher",), entropy_beside_teacher=self.beta > 0 and self.route == "entropy"
        )

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        return torch.full_like(batch.is_correct, self.beta > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        read = batch.response_mask & batch.has_context()[batch.rollout_ids]
        if self.beta == 0 or not read.any():
            return one_path(advantages, batch.response_mask)
        gap = batch.teacher_gap().double()
        median = quantile(gap.abs(), 0.5, batch)
        uncapped = gap / (per_token(median, batch.rollout_ids) + 1e-6)
        capped = uncapped if self.max_gap is None else uncapped.clamp(-self.max_gap, self.max_gap)
        push = self.beta * self._direction(batch) * self._gate(gap, capped) * capped
        metrics = {
            "gap_median": median[batch.rollout_ids[read].unique()].mean().item(),
            "gap_capped": (capped != uncapped)[read].double().mean().item(),
            "push_max": push[read].abs().max().item(),
        }
        return one_path((advantages + push).float(), batch.response_mask)._replace(metrics=metrics)

    def _direction(self, batch: ResponseBatch) -> PerToken | float:
        """z: above 0 towards the teacher, below 0 away from it."""
        if self.route in ("attract", "repel"):
            return 1.0 if self.route == "attract" else -1.0
        if self.route == "position":
            signal = sinusoidal_position(batch)
        else:
            assert batch.entropy is not None  # promised by the loop, as `needs` says
            signal = batch.entropy
        return router(signal, self.quantile, batch, shape=self.direction)

    def _gate(self, gap: PerToken, normalised: PerToken) -> PerToken | float:
        """The share of a token's normalised gap that goes through."""
        if self.gate == "none":
            return 1.0
        if self.gate == "fixed":
            return (gap.abs() > self.min_gap).double()
        size = normalised.abs()
        return size if self.gate == "magnitude" else torch.sigmoid(size - 1)
