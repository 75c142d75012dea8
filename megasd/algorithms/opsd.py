"""OPSD (arXiv:2601.18734): match the self-teacher's next-token distribution on one's own rollouts.

The teacher is the initial policy, reading the response after a verified solution; no reward is
used. The paper prints the divergence over the whole vocabulary, which is the default; its code's
top-k variant is `divergence: {support: teacher, rest: renormalise}`, its clipped one
`divergence: {kind: forward_kl, entry_clip: 0.05}`. RLSD (arXiv:2604.03128) compares with two
losses of a single token, here `ablation`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from megasd.algorithms.base import Needs
from megasd.algorithms.families import Distillation
from megasd.losses.config import DivergenceConfig
from megasd.types import PerToken, ResponseBatch, StudentOutput


@dataclass(frozen=True, kw_only=True)
class OPSD(Distillation):
    """Loss of a token: the divergence between teacher T and student S, by default JSD 0.5.

    With `ablation` in its place: teacher_top1 is -log S(v) at v = argmax T; student_top1 is
    T(v) log(T(v) / S(v)), not renormalised, at v = argmax S of the old weights. Rollouts without
    context have no loss.
    """

    paper: ClassVar[str] = "arXiv:2601.18734"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "frozen"},
        "context": {"sources": ["solution"]},
        "rollout": {"group_size": 1},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "paper",
        "divergence": "paper",
        "ablation": "megasd",
        "teacher.weights": "paper",
        "context.sources": "paper",
        "rollout.group_size": "megasd",
    }

    divergence: DivergenceConfig = field(default_factory=lambda: DivergenceConfig(support="full"))
    ablation: Literal["teacher_top1", "student_top1"] | None = None  # in place of the divergence

    @property
    def needs(self) -> Needs:
        if self.ablation is None:
            return super().needs
        return replace(
            super().needs,
            support="teacher" if self.ablation == "teacher_top1" else "student",
            support_size=1,
            teacher_hidden=False,
        )

    def divergences(self, student: StudentOutput, batch: ResponseBatch) -> PerToken:
        if self.ablation is None:
            return super().divergences(student, batch)
        logprobs = student.support_logprobs[:, 0]
        if self.ablation == "teacher_top1":
            return -logprobs
        assert batch.support is not None  # promised by the loop, as `needs` says
        assert batch.support.teacher_logprobs is not None
        teacher_logprobs = batch.support.teacher_logprobs[:, 0]
        return teacher_logprobs.exp() * (teacher_logprobs - logprobs)
