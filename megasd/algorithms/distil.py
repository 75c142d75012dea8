"""DistIL (arXiv:2606.05152, "RL from Rich Feedback with Distributional DAgger").

Forward cross-entropy to a teacher that has read the feedback; each token also answers for what
follows it. Decided here: ids outside the teacher's top K are one more bucket; the future term is
the clipped surrogate; sums are 0-based as in appendix C (Algorithm 1 would divide by 0 at the end).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from megasd.algorithms.base import Algorithm, Needs
from megasd.losses.credit import on_rollouts
from megasd.losses.distillation import future_credit, group_position_mean
from megasd.losses.divergence import cross_entropy
from megasd.losses.policy_gradient import ClipRange, clipped_surrogate
from megasd.types import Credit, PerToken, ResponseBatch, StudentOutput, TokenLoss


@dataclass(frozen=True, kw_only=True)
class DistIL(Algorithm):
    """Eq. 4-5: H_t - pg(-C_t), H_t = -sum_a T(a) log S(a) with gradient through S.

    C_t is the mean of H over the later tokens at the old weights, without gradient, 0 for the last
    token: every advantage is <= 0. Rollouts without context have no loss.
    """

    paper: ClassVar[str] = "arXiv:2606.05152"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "ema", "decay": 0.99},
        "context": {"sources": ["sibling"]},
        "optimizer": {"lr": 5e-5},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "teacher": "paper",
        "top_k": "paper",
        "num_samples": "megasd",
        "future_credit": "paper (eq. 5)",
        "baseline": "megasd",
        "clip": "DAPO (arXiv:2503.14476)",
        "teacher.weights": "paper",
        "teacher.decay": "paper",
        "context.sources": "paper",
        "optimizer.lr": "paper",
    }

    teacher: Literal["distribution", "samples"] = "distribution"  # samples: H = -mean_s log S(a_s)
    top_k: int = 100  # of teacher distribution: K
    num_samples: int = 8  # of teacher samples: tokens drawn from it at each position
    future_credit: bool = True  # False: cross-entropy alone
    baseline: Literal["none", "group_position"] = "none"  # subtracts the group's mean C_t at t
    clip: ClipRange = field(default_factory=ClipRange)

    def __post_init__(self) -> None:
        for name in ("top_k", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name} must be 1 or more, not {getattr(self, name)}")
        if self.baseline != "none" and not self.future_credit:
            raise ValueError("algorithm.baseline must be none: algorithm.future_credit is false")

    @property
    def needs(self) -> Needs:
        is_sampled = self.teacher == "samples"
        return Needs(
            rewards=False,
            groups=self.baseline == "group_position",
            teachers=("teacher",),
            old_logprobs=self.future_credit,
            support="samples" if is_sampled else "teacher",
            support_size=self.num_samples if is_sampled else self.top_k,
            cross_entropy=self.future_credit,
        )

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        credit = on_rollouts(batch.has_context(), batch)
        is_used = credit.path >= 0
        if not self.future_credit or not is_used.any():
            return credit
        costs = batch.teachers["teacher"].cross_entropy
        assert costs is not None  # promised by the loop, as `needs` says
        future, has_future = future_credit(costs, is_used, batch.rollout_ids)
        advantages = -future
        if self.baseline == "group_position":
            if len(batch.group_ids.unique()) == batch.num_rollouts:
                raise ValueError("algorithm.baseline: group_position wants rollout.group_size > 1")
            has_future &= is_used  # a last token answers for nothing: no 0 in the mean
            mean = group_position_mean(future, has_future, batch.rollout_ids, batch.group_ids)
            advantages = torch.where(has_future, mean - future, 0.0)
        return credit._replace(
            advantages=torch.where(is_used, advantages, 0.0),
            metrics={"future_credit": future[is_used].mean(dtype=torch.float64).item()},
        )

    def cross_entropies(self, student: StudentOutput, batch: ResponseBatch) -> PerToken:
        """H of each token in nats, with gradient."""
        if self.teacher == "samples":
            return -student.support_logprobs.mean(dim=1)
        assert batch.support is not None  # promised by the loop, as `needs` says
        assert batch.support.teacher_logprobs is not None
        return cross_entropy(
            student.support_logprobs,
            batch.support.teacher_logprobs,
            rest="tail",
            vocab_size=student.vocab_size,
        )

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        loss = self.cross_entropies(student, batch)
        metrics = {"cross_entropy": loss.detach()}
        if not self.future_credit:
            return TokenLoss(loss, metrics)
        assert batch.old_logprobs is not None  # promised by the loop
        surrogate = clipped_surrogate(
            student.logprobs, batch.old_logprobs, credit.advantages, clip=self.clip
        )
        return TokenLoss(loss + surrogate.loss, {**metrics, **surrogate.metrics})
