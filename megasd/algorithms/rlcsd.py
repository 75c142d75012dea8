"""RLCSD (arXiv:2606.11709): right against wrong hints, so that what any hint does drops out.

The teacher, an older copy of the policy, reads each response after a correct sibling and after up
to K incorrect ones. Where they differ, the advantage is shifted, and those tokens have an average
of their own. Decided here: with mix or beta 0 nothing is read or left out, and it is GRPO.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.policy_gradient import ClipRange
from megasd.losses.reduce import Reduction
from megasd.types import Credit, PerToken, ResponseBatch, RolloutMask, TokenMask


@dataclass(frozen=True, kw_only=True)
class RLCSD(PolicyGradient):
    """Loss: mean of -pg(A) over path 0 plus eta x mean of -pg(A') over path 1.

    e = log-prob after the correct hint - log of the mean probability after the wrong hints;
    u = clip(beta mix tanh(e / tau), -`max_shift`, `max_shift`); path 1 holds the tokens with
    |u| > delta. A' = A + u, cut at 0 where it would change its sign, 0 where A = 0. No gradient
    flows through e. A rollout without both contexts leaves the update, and its denominators.
    """

    paper: ClassVar[str] = "arXiv:2606.11709"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "snapshot", "every": 10},
        "context": {"sources": ["sibling"], "sibling": "random", "wrong_answer_only": False},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "code",
        "scale_by_std": "paper",
        "clip": "code",
        "mix": "code",
        "beta": "code",
        "tau": "code",
        "delta": "code",
        "eta": "code",
        "max_shift": "code",
        "wrong_contexts": "code",
        "teacher.weights": "code",
        "teacher.every": "code",
        "context.sources": "paper",
        "context.sibling": "code",
        "context.wrong_answer_only": "code",
    }

    reduction: Reduction = "token_mean"  # of either path
    clip: ClipRange = field(default_factory=lambda: ClipRange(low=0.2, high=0.2))
    mix: float = 0.5  # constant; 0 is GRPO
    beta: float = 1.0
    tau: float = 0.02  # nats of e at which the shift begins to saturate
    delta: float = 0.02  # smaller shifts are not made
    eta: float = 1.0  # weight of the shifted tokens' average
    max_shift: float = 2.0
    wrong_contexts: int = 4  # K: at most so many incorrect siblings are read

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"algorithm.mix must be between 0 and 1, not {self.mix}")
        if not self.tau > 0:
            raise ValueError(f"algorithm.tau must be above 0, not {self.tau}")
        lowest = {"beta": 0, "delta": 0, "eta": 0, "max_shift": 0, "wrong_contexts": 1}
        for name, bound in lowest.items():
            value = getattr(self, name)
            if not value >= bound:
                raise ValueError(f"algorithm.{name} must be {bound} or more, not {value}")

    @property
    def _wrong(self) -> list[str]:
        return [f"wrong[{k}]" for k in range(self.wrong_contexts)]

    @property
    def needs(self) -> Needs:
        return Needs(teachers=("teacher", *self._wrong))

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        has_wrong = torch.stack([has_context[role] for role in self._wrong]).any(0)
        return has_context["teacher"] & has_wrong & (self.beta * self.mix > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        if not self.beta * self.mix > 0:
            return one_path(advantages, batch.response_mask)
        contrast, has_both = self._contrast(batch)
        shift = self.beta * self.mix * (contrast / self.tau).tanh()
        shift = shift.clamp(-self.max_shift, self.max_shift)
        used = batch.response_mask & has_both
        selected = used & (shift.abs() > self.delta)
        shifted = advantages + shift
        shifted = torch.where(advantages > 0, shifted.clamp(min=0.0), shifted.clamp(max=0.0))
        shifted = shifted * (advantages != 0)
        credit = torch.where(selected, shifted, advantages)
        weights = torch.where(selected, self.eta, 1.0) * (used & (credit != 0))
        metrics = {
            "contrasted": int(used.sum()) / max(1, int(batch.response_mask.sum())),
            "selected": int(selected.sum()) / max(1, int(used.sum())),
        }
        return Credit(credit, weights, used.long() + selected.long() - 1, metrics)

    def _contrast(self, batch: ResponseBatch) -> tuple[PerToken, TokenMask]:
        """e in nats, 0 where a context lacks, and the tokens of rollouts that have both."""
        is_read = torch.stack([batch.has_context(role) for role in self._wrong])
        gaps = torch.stack([batch.teacher_gap(role) for role in self._wrong])
        gaps = gaps.masked_fill(~is_read[:, batch.rollout_ids], -math.inf)
        log_count = per_token(is_read.sum(0).log(), batch.rollout_ids)
        has_both = (is_read.any(0) & batch.has_context())[batch.rollout_ids]
        # Gaps instead of log-probs: the old ones drop out of the difference.
        contrast = batch.teacher_gap() - (gaps.logsumexp(0) - log_count)
        return torch.where(has_both, contrast, 0.0), has_both
