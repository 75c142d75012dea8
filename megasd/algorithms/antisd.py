"""AntiSD (arXiv:2605.11609): self-distillation with its sign reversed, as a term of the advantage.

The teacher is the policy itself, reading the response after a solution. What it finds likelier
than the student did is pushed down, deliberation that it finds needless is held up. A gate
watches the teacher's entropy and takes the term away where that collapses.

Decided here, where the paper leaves it open: H_ref is the median over all tokens with context of
all warm-up batches together, rounded to 12 bits, so that values are counted and no token is kept;
the gate moves before a batch is given its credit; a batch without any context leaves it as it is,
and a warm-up that saw none goes on until one comes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.median import add_to_counts, median
from megasd.types import Credit, PerToken, ResponseBatch, RolloutMask


@dataclass(frozen=True, kw_only=True)
class AntiSD(PolicyGradient):
    """A_hat = A - lam x 0.5 (softplus(D) - log 2), D = teacher - old log-probs, no gradient.

    D = 0, as without context, changes nothing. It learns where A = 0 too, and can flip signs.
    """

    paper: ClassVar[str] = "arXiv:2605.11609"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "live"},
        "context": {"sources": ["solution"]},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "scale_by_std": "megasd",
        "clip": "DAPO (arXiv:2503.14476)",
        "lam": "paper",
        "warmup_steps": "paper",
        "off_below": "paper",
        "teacher.weights": "megasd",
        "context.sources": "paper",
    }

    lam: float = 0.5  # 0 is GRPO
    warmup_steps: int = 5  # lam is 0, and the teacher's entropy H_ref is measured
    off_below: float = 0.93  # off where the median entropy is below this share of H_ref

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise ValueError(f"algorithm.lam must be 0 or more, not {self.lam}")
        if self.warmup_steps < 1:
            raise ValueError(f"algorithm.warmup_steps must be 1 or more, not {self.warmup_steps}")
        if not 0 <= self.off_below <= 1:
            raise ValueError(f"algorithm.off_below must be between 0 and 1, not {self.off_below}")

    @property
    def needs(self) -> Needs:
        return Needs(teachers=("teacher",), teacher_entropy=True)

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        """All, even where the term is off: the gate looks at their entropy."""
        return torch.full_like(batch.is_correct, self.lam > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        memory, metrics = self._gate(batch, step)
        lam = self.lam * metrics["gate"]
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        credit = advantages - 0.5 * lam * _centred_softplus(batch.teacher_gap())
        return one_path(credit, batch.response_mask)._replace(
            metrics={**metrics, "lam": lam}, memory=memory
        )

    def _gate(self, batch: ResponseBatch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The memory after this batch, and what to log: `gate` is 1 where the term is on."""
        entropies, memory = _teacher_entropies(batch), batch.memory
        metrics = {"teacher_entropy": median(entropies)} if len(entropies) else {}
        if "reference_entropy" not in memory:
            values = memory.get("warmup_entropies", entropies[:0])
            counts = memory.get("warmup_counts", torch.ones_like(values, dtype=torch.int64))
            values, counts = add_to_counts(values, counts, entropies)
            metrics["gate"] = 0.0
            if step + 1 < self.warmup_steps or not len(values):
                return {"warmup_entropies": values, "warmup_counts": counts}, metrics
            return _memory(median(values, counts), is_on=True), metrics
        reference, is_on = memory["reference_entropy"].item(), bool(memory["is_on"])
        if len(entropies):
            is_on = metrics["teacher_entropy"] >= (self.off_below if is_on else 1.0) * reference
        metrics |= {"reference_entropy": reference, "gate": float(is_on)}
        return _memory(reference, is_on=is_on), metrics


def _memory(reference: float, *, is_on: bool) -> dict[str, Tensor]:
    return {
        "reference_entropy": torch.tensor(reference, dtype=torch.float64),
        "is_on": torch.tensor(is_on),
    }


def _teacher_entropies(batch: ResponseBatch) -> PerToken:
    """Of the response tokens with context."""
    if "teacher" not in batch.teachers:
        return batch.rewards.new_zeros(0)
    entropy = batch.teachers["teacher"].entropy
    assert entropy is not None  # promised by the loop, as `needs` says
    return entropy[batch.response_mask & batch.has_context()[batch.rollout_ids]]


def _centred_softplus(x: PerToken) -> PerToken:
    """softplus(x) - log 2, exactly 0 at 0, finite for every finite x."""
    return x.clamp(min=0.0) + ((-x.abs()).expm1() / 2).log1p()
