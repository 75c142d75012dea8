"""SDPO (arXiv:2601.20802): distil from oneself after reading a success or the feedback.

Student and teacher are compared on the student's K most likely tokens and the rest as one more.
Departs from the authors' code, which picks the K tokens at the current weights: here they are those
of the old weights, fixed for the batch. The paper gives the teacher's EMA as a rate, 1 - decay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megasd.algorithms.families import Distillation
from megasd.losses.distillation import truncated_importance_ratio
from megasd.types import Credit, ResponseBatch, StudentOutput, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SDPO(Distillation):
    """Loss of a token: min(rho, max_importance_ratio) x divergence, rho without gradient.

    rho = exp(logprobs - old_logprobs). Rollouts without context leave the update and its
    denominators; no reward enters the loss.
    """

    paper: ClassVar[str] = "arXiv:2601.20802"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "ema", "decay": 0.95},
        "context": {"sources": ["sibling"]},
        "optimizer": {"lr": 1e-5},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "paper",
        "divergence": "paper",
        "max_importance_ratio": "paper",
        "teacher.weights": "paper",
        "teacher.decay": "paper",
        "context.sources": "paper",
        "optimizer.lr": "paper",
    }

    max_importance_ratio: float = 2.0

    def __post_init__(self) -> None:
        if not self.max_importance_ratio > 0:
            raise ValueError(
                f"algorithm.max_importance_ratio must be above 0, not {self.max_importance_ratio}"
            )

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        assert batch.old_logprobs is not None  # promised by the loop
        ratio = truncated_importance_ratio(
            student.logprobs, batch.old_logprobs, maximum=self.max_importance_ratio
        )
        loss, metrics = super().token_loss(student, batch, credit)
        return TokenLoss(ratio * loss, metrics)
