"""SRPO (sample routing, arXiv:2604.02288): GRPO for what went well, SDPO for what can be mended.

An incorrect rollout that has a context is distilled, more where the teacher is sure of itself; all
others get the clipped surrogate, so an incorrect one without context is blamed as in GRPO. One
denominator for both. The average of the weights is over the global mini-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import Distillation, PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.distillation import confidence_weights, truncated_importance_ratio
from megasd.losses.reduce import Reduction
from megasd.types import Credit, ResponseBatch, RolloutMask, StudentOutput, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SRPO(Distillation, PolicyGradient):
    """Routed: w x min(rho, max_importance_ratio) x divergence; all others: -pg(A).

    w = exp(-beta H_T) / mean over the routed tokens of the same, H_T the teacher's entropy in
    nats; rho has no gradient. Correct means reward >= reward.success_threshold.
    """

    paper: ClassVar[str] = "arXiv:2604.02288"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "ema", "decay": 0.95},
        "context": {"sources": ["sibling"]},
        "optimizer": {"lr": 5e-6},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "scale_by_std": "paper",
        "clip": "DAPO (arXiv:2503.14476)",
        "divergence": "SDPO (arXiv:2601.20802)",
        "max_importance_ratio": "SDPO (arXiv:2601.20802)",
        "beta": "paper",
        "teacher.weights": "SDPO (arXiv:2601.20802)",
        "teacher.decay": "SDPO (arXiv:2601.20802)",
        "context.sources": "paper",
        "optimizer.lr": "RLRT's baseline (arXiv:2605.10781)",
    }

    reduction: Reduction = "token_mean"
    scale_by_std: bool = False
    max_importance_ratio: float = 2.0
    beta: float = 1.0  # 0: every routed token weighs 1

    def __post_init__(self) -> None:
        if not self.max_importance_ratio > 0:
            raise ValueError(
                f"algorithm.max_importance_ratio must be above 0, not {self.max_importance_ratio}"
            )
        if not self.beta >= 0:
            raise ValueError(f"algorithm.beta must be 0 or more, not {self.beta}")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rewards=True, teacher_entropy=True)

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        return ~batch.is_correct

    def is_routed(self, batch: ResponseBatch) -> RolloutMask:
        return ~batch.is_correct & batch.has_context()

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        is_routed = self.is_routed(batch)
        advantages = torch.where(is_routed, 0.0, self.advantages(batch))
        credit = one_path(per_token(advantages, batch.rollout_ids), batch.response_mask)
        routed_tokens = batch.response_mask & is_routed[batch.rollout_ids]
        metrics = {"routed": is_routed.double().mean().item()}
        if not routed_tokens.any():
            return credit._replace(metrics=metrics)
        entropy = batch.teachers["teacher"].entropy
        assert entropy is not None  # promised by the loop, as `needs` says
        minibatch_ids = batch.minibatch_ids[batch.rollout_ids]
        weights = confidence_weights(entropy, routed_tokens, minibatch_ids, beta=self.beta)
        metrics["routed_weight_max"] = weights.max().item()
        return credit._replace(
            token_weights=torch.where(routed_tokens, weights, credit.token_weights),
            metrics=metrics,
        )

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        loss, metrics = PolicyGradient.token_loss(self, student, batch, credit)
        if "teacher" not in batch.teachers:  # no rollout of the batch was read: no support
            return TokenLoss(loss, metrics)
        assert batch.old_logprobs is not None  # promised by the loop
        ratio = truncated_importance_ratio(
            student.logprobs, batch.old_logprobs, maximum=self.max_importance_ratio
        )
        distillation = ratio * self.divergences(student, batch)
        is_routed = self.is_routed(batch)[batch.rollout_ids]
        return TokenLoss(torch.where(is_routed, distillation, loss), metrics)
