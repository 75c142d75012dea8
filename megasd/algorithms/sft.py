"""Supervised fine-tuning: cross-entropy on the dataset's solutions, nothing is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.losses.credit import one_path
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


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Loss of a token: -log pi(y_t given x, y_<t) in nats, for every solution token."""

    needs: ClassVar[Needs] = Needs(rewards=False, solutions=True)
    paper: ClassVar[str] = "maximum likelihood"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rollout": {"group_size": 1}}

    reduction: Reduction = "token_mean"

    def rows_to_keep(
        self, rewards: PerRollout, group_ids: RolloutIndex, refills: int
    ) -> RolloutMask:
        return torch.ones_like(rewards, dtype=torch.bool)

    def rows_to_score(self, batch: ResponseBatch, step: int) -> RolloutMask:
        return torch.zeros_like(batch.rewards, dtype=torch.bool)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        everywhere = torch.ones(len(batch.rollout_ids), device=batch.rollout_ids.device)
        return one_path(everywhere, batch.response_mask)

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        return TokenLoss(-student.logprobs, {})
