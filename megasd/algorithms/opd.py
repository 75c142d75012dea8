"""On-policy distillation as a policy gradient: a token earns what the teacher finds it likelier.

The teacher is another model of the same vocabulary, or the policy itself with a privileged
context. In expectation over the student's own tokens the gradient is that of -coef KL(student,
teacher) at each position, nothing carried over to later ones. Departs from the blog post: the
clipped surrogate instead of plain importance sampling.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.reduce import Reduction
from megasd.types import Credit, ResponseBatch, RolloutMask


@dataclass(frozen=True, kw_only=True)
class OPD(PolicyGradient):
    """A_hat = A_env - coef (old log-prob - teacher's), in nats, not clipped.

    A_env is the group's advantage; without it the verifiers are not called. Without context
    A_hat = A_env.
    """

    paper: ClassVar[str] = "On-Policy Distillation (Thinking Machines Lab, 2025)"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "checkpoint"},
        "context": {"sources": []},  # the plain prompt
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "scale_by_std": "megasd",
        "clip": "DAPO (arXiv:2503.14476)",
        "A_env": "megasd",
        "coef": "paper",
        "teacher.weights": "paper",
        "context.sources": "paper",
    }

    reduction: Reduction = "token_mean"
    A_env: bool = True  # false: the teacher alone, no rewards
    coef: float = 1.0

    def __post_init__(self) -> None:
        if not self.coef >= 0:
            raise ValueError(f"algorithm.coef must be 0 or more, not {self.coef}")
        if self.coef == 0 and not self.A_env:
            raise ValueError(
                "algorithm.coef is 0 and algorithm.A_env is false, so nothing would be learnt; "
                "raise the one or set the other"
            )

    @property
    def needs(self) -> Needs:
        return Needs(rewards=self.A_env, teachers=("teacher",))

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        return torch.full_like(batch.is_correct, self.coef > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        credit = self.coef * batch.teacher_gap()
        if self.A_env:
            credit = per_token(self.advantages(batch), batch.rollout_ids) + credit
        return one_path(credit, batch.response_mask)
