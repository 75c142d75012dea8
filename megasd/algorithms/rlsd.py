"""RLSD (arXiv:2604.03128): the verifier gives each token's sign, the self-teacher its size.

The teacher is the policy itself, reading the response after the answer. A token it finds
likelier than the student did takes more of the credit in a good rollout and less of the blame in
a bad one. Departs from the paper: its objective (16) drops the importance ratio and takes
min[w A, clip(w) A]; here Algorithm 1, line 17, stands inside the ordinary clipped surrogate.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from megasd.algorithms.base import Needs
from megasd.losses.credit import group_advantages, one_path, per_token
from megasd.losses.policy_gradient import ClipRange, clipped_surrogate
from megasd.losses.reduce import Reduction
from megasd.types import (
    Credit,
    PerRollout,
    PerToken,
    ResponseBatch,
    RolloutIndex,
    RolloutMask,
    StudentOutput,
    TokenLoss,
)


@dataclass(frozen=True, kw_only=True)
class RLSD:
    """Eq. 13-15: A_hat = A [(1 - mix) + mix clip(w, 1 - d, 1 + d)], w = exp(sign(A) D).

    D = teacher - old log-probs, no gradient; d = `max_deviation`. Without context D = 0: GRPO.
    """

    needs: ClassVar[Needs] = Needs(teachers=("teacher",))
    paper: ClassVar[str] = "arXiv:2604.03128"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "snapshot", "every": 10},
        "context": {"source": "answer"},
    }

    clip: ClipRange = field(default_factory=ClipRange)
    scale_by_std: bool = True
    reduction: Reduction = "sequence_mean"
    mix: float = 0.5  # at step 0; 0 is GRPO
    mix_steps: int | None = 50  # linear to 0 at this step; null: constant
    max_deviation: float = 0.2  # d: token weights stay in [1 - mix d, 1 + mix d]
    credit: Literal["clipped", "pessimistic"] = "clipped"  # pessimistic: min[w A, clip(w) A]

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
        if self.credit == "pessimistic":
            warnings.warn(
                "algorithm.credit: pessimistic has no lower bound where the advantage is negative; "
                "clipped is the form that RLSD's Algorithm 1 prints",
                stacklevel=2,
            )
        elif not self.mix * self.max_deviation < 1:
            raise ValueError(
                "algorithm.mix x algorithm.max_deviation must stay below 1, else the teacher could "
                f"flip the verifier's sign; {self.mix} x {self.max_deviation} does not"
            )

    def mix_at(self, step: int) -> float:
        if self.mix_steps is None:
            return self.mix
        return self.mix * max(0.0, 1.0 - step / self.mix_steps)

    def rows_to_keep(
        self, rewards: PerRollout, group_ids: RolloutIndex, refills: int
    ) -> RolloutMask:
        return torch.ones_like(rewards, dtype=torch.bool)

    def rows_to_score(self, batch: ResponseBatch, step: int) -> RolloutMask:
        advantages = group_advantages(
            batch.rewards, batch.group_ids, scale_by_std=self.scale_by_std
        )
        return (advantages != 0) & (self.mix_at(step) > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(
            group_advantages(batch.rewards, batch.group_ids, scale_by_std=self.scale_by_std),
            batch.rollout_ids,
        )
        mix, teacher = self.mix_at(step), batch.teachers.get("teacher")
        if mix > 0 and teacher is not None:
            assert batch.old_logprobs is not None  # promised where there is a teacher
            advantages = self._mixed(advantages, teacher.logprobs - batch.old_logprobs, mix)
        return one_path(advantages, batch.response_mask)

    def _mixed(self, advantages: PerToken, teacher_gap: PerToken, mix: float) -> PerToken:
        weights = torch.exp(advantages.sign() * teacher_gap)
        weighed = advantages * weights.clamp(1 - self.max_deviation, 1 + self.max_deviation)
        if self.credit == "pessimistic":
            weighed = torch.minimum(advantages * weights, weighed)
        # (1 - mix) A + mix (weighed), and exactly A where the teacher agrees with the student
        return torch.lerp(advantages, weighed, mix)

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        assert batch.old_logprobs is not None  # promised by the loop
        return clipped_surrogate(
            student.logprobs, batch.old_logprobs, credit.advantages, clip=self.clip
        )
