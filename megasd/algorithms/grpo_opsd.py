"""GRPO + OPSD: the verifier's surrogate and the self-teacher's divergence, added.

The baseline that RLSD (arXiv:2604.03128) compares with. Where two averages could be meant, the two
terms share one denominator: a rollout without context counts with divergence 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import Distillation, PolicyGradient
from megasd.losses.config import DivergenceConfig
from megasd.losses.credit import one_path, per_token
from megasd.losses.reduce import Reduction
from megasd.types import Credit, ResponseBatch, StudentOutput, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GRPOWithOPSD(Distillation, PolicyGradient):
    """Loss of a token: (1 - coef) x -pg(A) + coef x divergence(T, S), by default JSD 0.5."""

    paper: ClassVar[str] = "arXiv:2604.03128"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "frozen"},
        "context": {"sources": ["solution"]},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "GRPO (arXiv:2402.03300)",
        "scale_by_std": "GRPO (arXiv:2402.03300)",
        "clip": "DAPO (arXiv:2503.14476)",
        "divergence": "OPSD (arXiv:2601.18734)",
        "coef": "megasd",
        "teacher.weights": "OPSD (arXiv:2601.18734)",
        "context.sources": "OPSD (arXiv:2601.18734)",
    }

    reduction: Reduction = "sequence_mean"
    divergence: DivergenceConfig = field(default_factory=lambda: DivergenceConfig(support="full"))
    coef: float = 0.5  # 0: GRPO, no teacher reads; 1: OPSD

    def __post_init__(self) -> None:
        if not 0 <= self.coef <= 1:
            raise ValueError(f"algorithm.coef must be between 0 and 1, not {self.coef}")

    @property
    def needs(self) -> Needs:
        if self.coef == 0:
            return Needs(old_logprobs=False)
        return replace(super().needs, rewards=True)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = (1 - self.coef) * self.advantages(
            batch
        )  # the surrogate is linear in their size
        credit = one_path(per_token(advantages, batch.rollout_ids), batch.response_mask)
        is_distilled = batch.response_mask & batch.has_context()[batch.rollout_ids]
        return credit._replace(token_weights=torch.where(is_distilled, 1.0, credit.token_weights))

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        loss, metrics = PolicyGradient.token_loss(self, student, batch, credit)
        has_context = batch.has_context()
        if has_context.any():  # of the whole batch: else nothing was read
            divergences = self.divergences(student, batch)
            divergences = torch.where(has_context[batch.rollout_ids], divergences, 0.0)
            loss = loss + self.coef * divergences
            metrics = {**metrics, "divergence": divergences.detach()}
        return TokenLoss(loss, metrics)
