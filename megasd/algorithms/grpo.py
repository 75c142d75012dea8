"""GRPO (arXiv:2402.03300): a rollout is as good as it beats its group, the same for every token.

Departs from the paper: no reference KL, and the upper clip is DAPO's. The presets `dapo`
(arXiv:2503.14476) and `dr_grpo` (arXiv:2503.20783) are in the registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.losses.credit import (
    group_advantages,
    one_path,
    overlong_penalty,
    per_token,
    rewards_differ,
)
from megasd.losses.policy_gradient import ClipRange, clipped_surrogate
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
class GRPO:
    """Loss of a token: -pg(A) - entropy_coef H, H its entropy in nats at the current weights."""

    needs: ClassVar[Needs] = Needs()
    paper: ClassVar[str] = "arXiv:2402.03300"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    clip: ClipRange = field(default_factory=ClipRange)
    scale_by_std: bool = True
    reduction: Reduction = "sequence_mean"
    entropy_coef: float = 0.0
    overlong_buffer: float = 0.0  # share of max_response_tokens; 0: no penalty for length
    dynamic_sampling: bool = False  # groups whose rewards are all equal are sampled anew
    max_refills: int = 10  # dynamic sampling: rounds per step, then equal groups are taken

    def __post_init__(self) -> None:
        if not self.entropy_coef >= 0:
            raise ValueError(f"algorithm.entropy_coef must be 0 or more, not {self.entropy_coef}")
        if not 0 <= self.overlong_buffer <= 1:
            raise ValueError(
                "algorithm.overlong_buffer is a share of rollout.max_response_tokens and must be "
                f"between 0 and 1, not {self.overlong_buffer}"
            )
        if self.max_refills < 0:
            raise ValueError(f"algorithm.max_refills must be 0 or more, not {self.max_refills}")

    def rows_to_keep(
        self, rewards: PerRollout, group_ids: RolloutIndex, refills: int
    ) -> RolloutMask:
        """All, but under dynamic sampling only groups with different rewards.

        The verifier's rewards, before any penalty for length, as DAPO's eq. 11. After
        `max_refills` rounds everything is kept: the batch keeps its size.
        """
        if self.dynamic_sampling and refills < self.max_refills:
            return rewards_differ(rewards, group_ids)
        return torch.ones_like(rewards, dtype=torch.bool)

    def rows_to_score(self, batch: ResponseBatch, step: int) -> RolloutMask:
        return torch.zeros_like(batch.rewards, dtype=torch.bool)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        rewards = batch.rewards
        if self.overlong_buffer > 0:
            tokens = batch.rollout_ids[batch.response_mask]
            rewards = rewards + overlong_penalty(
                torch.bincount(tokens, minlength=batch.num_rollouts),
                buffer_tokens=self.overlong_buffer * batch.max_response_tokens,
                max_response_tokens=batch.max_response_tokens,
            )
        advantages = group_advantages(rewards, batch.group_ids, scale_by_std=self.scale_by_std)
        return one_path(
            per_token(advantages, batch.rollout_ids),
            batch.response_mask,
            zeros_count=self.entropy_coef > 0,
        )

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        assert batch.old_logprobs is not None  # promised by the loop
        loss, metrics = clipped_surrogate(
            student.logprobs, batch.old_logprobs, credit.advantages, clip=self.clip
        )
        if self.entropy_coef > 0:
            entropy = student.entropy
            loss = loss - self.entropy_coef * entropy
            metrics = {**metrics, "entropy": entropy.detach()}
        return TokenLoss(loss, metrics)
