"""Supervised fine-tuning: cross-entropy on the dataset's solutions, nothing is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Algorithm, Needs
from megasd.losses.credit import on_rollouts
from megasd.types import Credit, ResponseBatch, StudentOutput, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SFT(Algorithm):
    """Loss of a token: -log pi(y_t given x, y_<t) in nats, for every solution token."""

    paper: ClassVar[str] = "maximum likelihood"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rollout": {"group_size": 1}}
    sources: ClassVar[Mapping[str, str]] = {"reduction": "megasd", "rollout.group_size": "megasd"}

    @property
    def needs(self) -> Needs:
        return Needs(rewards=False, solutions=True)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        return on_rollouts(torch.ones_like(batch.is_correct), batch)

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        return TokenLoss(-student.logprobs, {})
