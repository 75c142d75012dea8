"""CEPO (arXiv:2605.19436): a token counts for what the right answer says of it and a wrong one not.

Two teachers, both the policy itself: one reads the response after the right answer, one after the
answer that an incorrect sibling gave. What any answer does to the wording drops out of their
difference. The authors' README speaks of RLSD where no wrong answer is found, and of d = 0.5;
their code then leaves the group's advantage, and runs with d = 0.2. So does this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.families import WeighedAdvantage
from megasd.losses.credit import one_path, per_token
from megasd.losses.reduce import Reduction
from megasd.types import Credit, ResponseBatch, RolloutMask

_RIGHT, _WRONG = "teacher", "wrong[0]"


@dataclass(frozen=True, kw_only=True)
class CEPO(WeighedAdvantage):
    """A_hat = A [(1 - mix) + mix clip(w, 1 - d, 1 + d)], w = exp(sign(A) E).

    E = log-prob after the right answer - log-prob after the wrong one, no gradient;
    d = `max_deviation`. Where either has nothing to read E = 0: GRPO.
    """

    paper: ClassVar[str] = "arXiv:2605.19436"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "live"},
        "context": {"sources": ["answer"], "wrong_answer_only": True},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "code",
        "scale_by_std": "code",
        "clip": "code",
        "mix": "code",
        "mix_steps": "code",
        "max_deviation": "code",
        "teacher.weights": "code",
        "context.sources": "code",
        "context.wrong_answer_only": "code",
    }

    reduction: Reduction = "token_mean"
    mix_steps: int | None = 25

    @property
    def needs(self) -> Needs:
        return Needs(teachers=(_RIGHT, _WRONG))

    def rows_to_score(
        self, batch: ResponseBatch, has_context: Mapping[str, RolloutMask], step: int
    ) -> RolloutMask:
        has_both = has_context[_RIGHT] & has_context[_WRONG]
        return has_both & (self.advantages(batch) != 0) & (self.mix_at(step) > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        # Of one reading alone the difference is no evidence: the other's gap is 0 by convention.
        has_both = batch.has_context(_RIGHT) & batch.has_context(_WRONG)
        evidence = batch.teacher_gap(_RIGHT) - batch.teacher_gap(_WRONG)
        evidence = torch.where(has_both[batch.rollout_ids], evidence, 0.0)
        credit = self.weighed(advantages, advantages.sign() * evidence, step)
        return one_path(credit, batch.response_mask)._replace(
            metrics={"contrasted": has_both.double().mean().item()}
        )
