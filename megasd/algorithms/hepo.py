"""HEPO (arXiv:2506.01939): only the tokens at which the student wavers most are learnt from.

Departs from the authors' code: the share is taken of the global mini-batch at the weights that
it was sampled with, there of each micro-batch at the current ones. The paper's setting is DAPO's,
of which the clip and the reduction are kept, not dynamic sampling nor the penalty for length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.reduce import Reduction
from megasd.losses.selection import only_highest_entropy
from megasd.types import Credit, ResponseBatch


@dataclass(frozen=True, kw_only=True)
class HEPO(PolicyGradient):
    """A_hat = A on the max(1, ceil(`token_share` n)) of a mini-batch's n tokens of highest entropy.

    Entropies are of the full distribution at the old weights; of equal ones the first token comes
    first. The other tokens leave the update, and its denominator.
    """

    paper: ClassVar[str] = "arXiv:2506.01939"
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "paper",
        "scale_by_std": "paper",
        "clip": "paper",
        "token_share": "paper",
    }

    reduction: Reduction = "token_mean"
    token_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.token_share <= 1:
            raise ValueError(
                "algorithm.token_share must be above 0 and at most 1 (1 is grpo), "
                f"not {self.token_share}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        credit = one_path(advantages, batch.response_mask)
        return only_highest_entropy(credit, batch, share=self.token_share)
