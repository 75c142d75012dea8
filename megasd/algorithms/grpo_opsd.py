"""GRPO + OPSD: the verifier's surrogate and the self-teacher's divergence, added.

The baseline that RLSD (arXiv:2604.03128) compares with. Decided here: two averages, the surrogate's
over all response tokens, the divergence's over those of rollouts with context.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import Distillation, PolicyGradient
from megasd.losses.config import DivergenceConfig
from megasd.losses.credit import one_path, per_token
from megasd.losses.reduce import Reduction, reduction_weights
from megasd.types import (
    Credit,
    PerToken,
    ResponseBatch,
    StudentOutput,
    TokenLoss,
    TokenMask,
)


@dataclass(frozen=True, kw_only=True)
class GRPOWithOPSD(Distillation, PolicyGradient):
    """(1 - coef) x mean of -pg(A) + coef x mean of divergence(T, S), by default JSD 0.5.

    A token with context is in both means. It has the weight of the second, as a multiple c of the
    first, and the loss divergence - pg(A) (1 - coef) / c. Tokens that a mismatch rejects leave
    only the first mean's denominator.
    """

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
        return super().needs if self.coef == 1 else replace(super().needs, rewards=True)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        if self.coef == 1:
            return super().assign_credit(batch, step)
        advantages = (1 - self.coef) * self.advantages(batch)
        credit = one_path(per_token(advantages, batch.rollout_ids), batch.response_mask)
        if self.coef == 0 or not batch.has_context().any():
            return credit
        is_read = batch.response_mask & batch.has_context()[batch.rollout_ids]
        of_all, of_read = self._shares(batch.response_mask, batch), self._shares(is_read, batch)
        weights = torch.where(is_read, self.coef * of_read / of_all, credit.token_weights)
        return credit._replace(token_weights=weights)

    def _shares(self, counted: TokenMask, batch: ResponseBatch) -> PerToken:
        """Of each counted token in the mean over its mini-batch."""
        return reduction_weights(
            self.reduction,
            torch.where(counted, batch.minibatch_ids[batch.rollout_ids], -1),
            batch.rollout_ids,
            num_rollouts=batch.num_rollouts,
            max_response_tokens=batch.max_response_tokens,
        )

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        if self.coef == 1:
            return super().token_loss(student, batch, credit)
        loss, metrics = PolicyGradient.token_loss(self, student, batch, credit)
        if self.coef == 0 or "teacher" not in batch.teachers:  # no rollout of the batch was read
            return TokenLoss(loss, metrics)
        is_read = batch.response_mask & batch.has_context()[batch.rollout_ids]
        divergences = torch.where(is_read, self.divergences(student, batch), 0.0)
        loss = loss / torch.where(is_read, credit.token_weights, 1.0) + divergences
        return TokenLoss(loss, {**metrics, "divergence": divergences.detach()})
