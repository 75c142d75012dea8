"""GKD, on-policy (arXiv:2306.13649): distil another model on the student's own rollouts.

The divergence form of on-policy distillation: the teacher is a checkpoint of the same vocabulary,
reading the plain prompt. Departs from the paper, which mixes outputs of the dataset in at a rate
1 - lambda: here every response is the student's (lambda = 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megasd.algorithms.families import Distillation
from megasd.losses.config import DivergenceConfig


@dataclass(frozen=True, kw_only=True)
class GKD(Distillation):
    """Loss of a token: the generalised JSD of eq. 2 between teacher and student, alpha its beta."""

    paper: ClassVar[str] = "arXiv:2306.13649"
    section_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"weights": "checkpoint"},
        "context": {"sources": []},  # the teacher reads the plain prompt
        "rollout": {"group_size": 1},
    }
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "divergence": "paper (eq. 2)",
        "teacher.weights": "paper",
        "context.sources": "paper",
        "rollout.group_size": "paper (Algorithm 1)",
    }

    divergence: DivergenceConfig = field(default_factory=lambda: DivergenceConfig(support="full"))
