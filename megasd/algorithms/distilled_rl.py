"""Distilled RL (arXiv:2607.17247): within a good rollout, the tokens the teacher favours earn more.

The teacher shares out the credit of a rollout with A > 0 and leaves its scale alone; a rollout
with A < 0 teaches by its reward only, since what the teacher prefers there says nothing of why it
failed. The paper's teacher is another model, which reads the plain prompt; a privileged context
works as well (`context.sources`, `teacher.weights: live`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.per_rollout import mean
from megasd.types import Credit, ResponseBatch, RolloutMask


@dataclass(frozen=True, kw_only=True)
class DistilledRL(PolicyGradient):
    """Where A > 0: A_hat = A q / (geometric mean of q over the rollout's response tokens); else A.

    q = clip(exp(D), 1 / `max_ratio`, `max_ratio`), D = teacher - old log-probs, no gradient.
    Without context D = 0: GRPO.
    """

    paper: ClassVar[str] = "arXiv:2607.17247"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "checkpoint"},
        "context": {"sources": []},  # the teacher reads the plain prompt
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "scale_by_std": "megasd",
        "clip": "DAPO (arXiv:2503.14476)",
        "max_ratio": "paper",
        "teacher.weights": "paper",
        "context.sources": "paper",
    }

    max_ratio: float = 3.0  # 1 is GRPO

    def __post_init__(self) -> None:
        if not 1 <= self.max_ratio < math.inf:
            raise ValueError(
                f"algorithm.max_ratio must be a finite number of 1 or more, not {self.max_ratio}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(teachers=("teacher",))

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        return (self.advantages(batch) > 0) & (self.max_ratio > 1)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        gap, bound = batch.teacher_gap(), math.log(self.max_ratio)
        logs = gap.clamp(-bound, bound)  # of q; over its geometric mean
        shares = (logs - per_token(mean(logs, batch), batch.rollout_ids)).exp().float()
        credit = one_path(
            torch.where(advantages > 0, advantages * shares, advantages), batch.response_mask
        )
        shared = (advantages > 0) & batch.has_context()[batch.rollout_ids] & batch.response_mask
        if not shared.any():
            return credit
        clipped = (gap.abs() > bound)[shared].double().mean().item()
        return credit._replace(metrics={"ratio_clipped": clipped})
