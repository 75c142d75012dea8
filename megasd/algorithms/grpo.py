"""GRPO (arXiv:2402.03300): a rollout is as good as it beats its group, the same for every token.

Departs from the paper: no reference KL unless `kl_coef` asks for it, and the upper clip is DAPO's.
The presets `dapo` (arXiv:2503.14476) and `dr_grpo` (arXiv:2503.20783) are in the registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import (
    group_advantages,
    one_path,
    overlong_penalty,
    per_token,
    rewards_differ,
)
from megasd.losses.policy_gradient import reference_kl
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
class GRPO(PolicyGradient):
    """Loss of a token: -pg(A) - entropy_coef H + kl_coef k(ref - logprob).

    H is the token's entropy in nats at the current weights, k an estimate of KL(student,
    reference), whose reference is the policy that the run began with.
    """

    paper: ClassVar[str] = "arXiv:2402.03300"
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "paper (eq. 3)",
        "scale_by_std": "paper (section 4.1.2)",
        "clip": "DAPO (arXiv:2503.14476)",
        "entropy_coef": "megasd",
        "kl_coef": "megasd (the paper: 0.04)",
        "kl_estimator": "paper (eq. 4)",
        "overlong_buffer": "megasd",
        "dynamic_sampling": "megasd",
        "max_refills": "megasd",
    }

    entropy_coef: float = 0.0
    kl_coef: float = 0.0  # above 0: the initial weights read every rollout too
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    overlong_buffer: float = 0.0  # share of max_response_tokens; 0: no penalty for length
    dynamic_sampling: bool = False  # groups whose rewards are all equal are sampled anew
    max_refills: int = 10  # dynamic sampling: rounds per step, then equal groups are taken

    def __post_init__(self) -> None:
        for name in ("entropy_coef", "kl_coef", "max_refills"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"algorithm.{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.overlong_buffer <= 1:
            raise ValueError(
                "algorithm.overlong_buffer is a share of rollout.max_response_tokens and must be "
                f"between 0 and 1, not {self.overlong_buffer}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(teachers=("reference",) if self.kl_coef > 0 else (), old_logprobs=False)

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
            zeros_count=self.entropy_coef > 0 or self.kl_coef > 0,
        )

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        loss, metrics = super().token_loss(student, batch, credit)
        if self.entropy_coef > 0:
            entropy = student.entropy
            loss = loss - self.entropy_coef * entropy
            metrics = {**metrics, "entropy": entropy.detach()}
        if self.kl_coef > 0:
            reference = batch.teachers["reference"].logprobs
            estimate = reference_kl(student.logprobs, reference, estimator=self.kl_estimator)
            loss = loss + self.kl_coef * estimate
            metrics = {**metrics, "kl_student_to_reference": estimate.detach()}
        return TokenLoss(loss, metrics)
