"""Entropy bonus (arXiv:2506.14758): a token at which the student wavered earns a little more.

Not a regulariser: the entropy carries no gradient, and no token is credited for raising it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.losses.credit import one_path, per_token
from megasd.losses.reduce import Reduction
from megasd.losses.selection import with_entropy_bonus
from megasd.types import Credit, ResponseBatch


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(PolicyGradient):
    """A_hat = A + min(alpha H, |A| / kappa), H the token's entropy in nats at the old weights.

    kappa > 1 keeps the verifier's sign; where A = 0 nothing is added.
    """

    paper: ClassVar[str] = "arXiv:2506.14758"
    sources: ClassVar[Mapping[str, str]] = {
        "reduction": "megasd",
        "scale_by_std": "paper",
        "clip": "DAPO (arXiv:2503.14476)",
        "alpha": "paper (GRPO)",
        "kappa": "paper",
    }

    reduction: Reduction = "token_mean"
    alpha: float = 0.4  # 0 is GRPO
    kappa: float = 2.0

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"algorithm.alpha must be 0 or more, not {self.alpha}")
        if not self.kappa > 1:
            raise ValueError(
                "algorithm.kappa must be above 1, else the bonus could undo the verifier's blame; "
                f"{self.kappa} is not"
            )

    @property
    def needs(self) -> Needs:
        return Needs(entropy=self.alpha > 0)

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        credit = one_path(advantages, batch.response_mask)
        if self.alpha == 0:
            return credit
        return with_entropy_bonus(credit, batch, alpha=self.alpha, kappa=self.kappa)
