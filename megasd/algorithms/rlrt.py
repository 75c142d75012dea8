"""RLRT (arXiv:2605.10781): in a correct rollout, tokens the teacher did not expect earn more.

RLSD with the teacher's sign reversed, on correct rollouts only (`reward.success_threshold`). The
teacher is the policy itself, reading the response after a correct sibling of its group; where
there is none, as for a lone correct rollout, the group's advantage stays: the paper does not say.
What the paper sets for instruct and for thinking models are presets in the registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import WeighedAdvantage
from megasd.losses.credit import clipped_share, one_path, per_token
from megasd.losses.reduce import Reduction
from megasd.types import Credit, ResponseBatch, RolloutMask


@dataclass(frozen=True, kw_only=True)
class RLRT(WeighedAdvantage):
    """Eq. 6-7: A_hat = A [(1 - mix) + mix clip(w, 1 - d, 1 + d)], w = exp(-sign(A) D).

    D = teacher - old log-probs, no gradient; d = `max_deviation`. Incorrect rollouts, and those
    without context, keep A_hat = A.
    """

    paper: ClassVar[str] = "arXiv:2605.10781"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "live"},
        "context": {"sources": ["sibling"]},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "paper",
        "scale_by_std": "paper",
        "clip": "DAPO (arXiv:2503.14476)",
        "mix": "paper",
        "mix_steps": "paper (base models)",
        "max_deviation": "paper (base models)",
        "gate": "paper (eq. 7)",
        "teacher.weights": "paper",
        "context.sources": "paper",
    }

    reduction: Reduction = "token_mean"
    max_deviation: float = 1.0
    gate: Literal["correct", "all"] = "correct"  # all: the ablation RLRT-all

    @property
    def needs(self) -> Needs:
        return Needs(teachers=("teacher",))

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        return self._is_open(batch) & (self.advantages(batch) != 0) & (self.mix_at(step) > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        is_open = self._is_open(batch)[batch.rollout_ids]
        log_weights = torch.where(is_open, -advantages.sign() * batch.teacher_gap(), 0.0)
        is_read = batch.response_mask & batch.has_context()[batch.rollout_ids]
        return one_path(self.weighed(advantages, log_weights, step), batch.response_mask)._replace(
            metrics=clipped_share(
                log_weights,
                is_read & is_open & (advantages != 0),
                max_deviation=self.max_deviation,
            )
        )

    def _is_open(self, batch: ResponseBatch) -> RolloutMask:
        """The rollouts whose credit the teacher may change."""
        return batch.is_correct if self.gate == "correct" else torch.ones_like(batch.is_correct)
