"""The families that methods come in: they change advantages, or they match distributions."""

from dataclasses import dataclass, field

import torch

from megasd.algorithms.base import Algorithm, Needs
from megasd.losses.config import DivergenceConfig
from megasd.losses.credit import group_advantages, on_rollouts
from megasd.losses.divergence import divergence
from megasd.losses.policy_gradient import ClipRange, clipped_surrogate
from megasd.losses.reduce import Reduction
from megasd.types import Credit, PerRollout, PerToken, ResponseBatch, StudentOutput, TokenLoss


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """Changes the advantage of each token, then takes the clipped surrogate: -pg(A_hat)."""

    clip: ClipRange = field(default_factory=ClipRange)
    scale_by_std: bool = True
    reduction: Reduction = "sequence_mean"

    def advantages(self, batch: ResponseBatch) -> PerRollout:
        """A: group-relative, per rollout."""
        return group_advantages(batch.rewards, batch.group_ids, scale_by_std=self.scale_by_std)

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        assert batch.old_logprobs is not None  # promised by the loop
        return clipped_surrogate(
            student.logprobs, batch.old_logprobs, credit.advantages, clip=self.clip
        )


@dataclass(frozen=True, kw_only=True)
class WeighedAdvantage(PolicyGradient):
    """A_hat = A [(1 - mix) + mix clip(w, 1 - d, 1 + d)]: each token's advantage is scaled.

    d = `max_deviation`. A weight that is exactly 1 leaves exactly A.
    """

    mix: float = 0.5  # at step 0; 0 is GRPO
    mix_steps: int | None = None  # linear to 0 at this step; null: constant
    max_deviation: float = 0.2  # d: what multiplies A stays in [1 - mix d, 1 + mix d]

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"algorithm.mix must be between 0 and 1, not {self.mix}")
        if self.mix_steps is not None and self.mix_steps < 1:
            raise ValueError(
                "algorithm.mix_steps must be 1 or more, or null for a constant mix, "
                f"not {self.mix_steps}"
            )
        if not self.max_deviation >= 0:
            raise ValueError(f"algorithm.max_deviation must be 0 or more, not {self.max_deviation}")
        if not self.mix * self.max_deviation < 1:
            raise ValueError(
                "algorithm.mix x algorithm.max_deviation must stay below 1, else the teacher could "
                f"flip the verifier's sign; {self.mix} x {self.max_deviation} does not"
            )

    def mix_at(self, step: int) -> float:
        if self.mix_steps is None:
            return self.mix
        return self.mix * max(0.0, 1.0 - step / self.mix_steps)

    def weighed(self, advantages: PerToken, log_weights: PerToken, step: int) -> PerToken:
        """A_hat, for w = exp(log_weights)."""
        clipped = log_weights.exp().clamp(1 - self.max_deviation, 1 + self.max_deviation)
        return torch.lerp(advantages, advantages * clipped, self.mix_at(step))


@dataclass(frozen=True, kw_only=True)
class Distillation(Algorithm):
    """A divergence between two next-token distributions, on rollouts with context only."""

    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)

    @property
    def needs(self) -> Needs:
        config = self.divergence
        is_full = config.support == "full"
        return Needs(
            rewards=False,
            teachers=("teacher",),
            old_logprobs=False,
            support=None if config.support == "full" else config.support,
            support_size=0 if is_full else config.top_k,
            teacher_hidden=is_full,
        )

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        return on_rollouts(batch.has_context(), batch)

    def divergences(self, student: StudentOutput, batch: ResponseBatch) -> PerToken:
        """The divergence at each token, nats; of no meaning on rollouts without context."""
        config = self.divergence
        if config.support == "full":
            return student.full_divergence(
                config.kind, alpha=config.alpha, entry_clip=config.entry_clip
            )
        support = batch.support
        assert support is not None  # promised by the loop, as `needs` says
        assert support.teacher_logprobs is not None
        return divergence(
            student.support_logprobs,
            support.teacher_logprobs,
            kind=config.kind,
            alpha=config.alpha,
            rest=config.rest,
            entry_clip=config.entry_clip,
            vocab_size=student.vocab_size,
        )

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        divergences = self.divergences(student, batch)
        return TokenLoss(divergences, {"divergence": divergences.detach()})
