"""RLSD (arXiv:2604.03128): the verifier gives each token's sign, the self-teacher its size.

The teacher is the policy itself, reading the response after the answer. A token it finds
likelier than the student did takes more of the credit in a good rollout and less of the blame in
a bad one. Departs from the paper: its objective (16) drops the importance ratio and takes
min[w A, clip(w) A]; here Algorithm 1, line 17, stands inside the ordinary clipped surrogate.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import WeighedAdvantage
from megasd.losses.credit import clipped_share, one_path, per_token
from megasd.types import Credit, ResponseBatch, RolloutMask


@dataclass(frozen=True, kw_only=True)
class RLSD(WeighedAdvantage):
    """Eq. 13-15: A_hat = A [(1 - mix) + mix clip(w, 1 - d, 1 + d)], w = exp(sign(A) D).

    D = teacher - old log-probs, no gradient; d = `max_deviation`. Without context D = 0: GRPO.
    """

    paper: ClassVar[str] = "arXiv:2604.03128"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "snapshot", "every": 10},
        "context": {"sources": ["answer"]},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "paper (eq. 16)",
        "scale_by_std": "paper",
        "clip": "DAPO (arXiv:2503.14476)",
        "mix": "paper (section 5.1)",
        "mix_steps": "paper (section 5.1)",
        "max_deviation": "paper (section 5.1)",
        "credit": "paper (Algorithm 1, line 17)",
        "teacher.weights": "paper (section 5.1)",
        "teacher.every": "paper (section 5.1)",
        "context.sources": "paper",
    }

    mix_steps: int | None = 50
    credit: Literal["clipped", "pessimistic"] = "clipped"  # pessimistic: min[w A, clip(w) A]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.credit == "pessimistic":
            warnings.warn(
                "algorithm.credit: pessimistic has no lower bound where the advantage is negative; "
                "clipped is the form that RLSD's Algorithm 1 prints",
                stacklevel=2,
            )

    @property
    def needs(self) -> Needs:
        return Needs(teachers=("teacher",))

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        return (self.advantages(batch) != 0) & (self.mix_at(step) > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        log_weights = advantages.sign() * batch.teacher_gap()
        credit = self.weighed(advantages, log_weights, step)
        if self.credit == "pessimistic":
            weights = log_weights.clamp(max=80.0).exp()  # finite: 0 x infinity is no number
            unclipped = torch.lerp(advantages, advantages * weights, self.mix_at(step))
            credit = torch.minimum(unclipped, credit)
        is_read = batch.response_mask & batch.has_context()[batch.rollout_ids]
        return one_path(credit, batch.response_mask)._replace(
            metrics=clipped_share(
                log_weights, is_read & (advantages != 0), max_deviation=self.max_deviation
            )
        )
