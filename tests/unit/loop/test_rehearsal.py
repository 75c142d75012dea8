"""A method that reads what it did not ask for is refused before the run."""

from dataclasses import dataclass
from typing import Any, cast

import pytest

from megasd.algorithms import ALGORITHMS, load_algorithm
from megasd.algorithms.base import Needs
from megasd.algorithms.families import PolicyGradient
from megasd.loop.rehearsal import rehearse
from megasd.losses.credit import one_path, per_token
from megasd.types import Credit, ResponseBatch


@dataclass(frozen=True, kw_only=True)
class Method(PolicyGradient):
    """A user's method: GRPO, plus what the teacher says."""

    forgets: bool = False

    @property
    def needs(self) -> Needs:
        return Needs() if self.forgets else Needs(teachers=("teacher",))

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        advantages = per_token(self.advantages(batch), batch.rollout_ids)
        return one_path(advantages + batch.teacher_gap(), batch.response_mask)


class ReadsEntropy(Method):
    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        return one_path(cast(Any, batch.entropy) * 2, batch.response_mask)


class ReturnsATensor(Method):
    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        return cast(Any, self.advantages(batch))


class ForgetsTheTokens(Method):
    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        return one_path(self.advantages(batch), batch.response_mask[:6])


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.filterwarnings("ignore")
def test_every_method_and_preset_reads_only_what_it_needs(name: str) -> None:
    options = {"base": "dasd"} if name == "temporal" else {}
    rehearse(load_algorithm(name).build(**options))


def test_the_same_method_passes_with_its_teacher_and_is_refused_without() -> None:
    rehearse(Method())
    with pytest.raises(ValueError, match=r"role 'teacher' has read, .*Needs\(teachers="):
        rehearse(Method(forgets=True))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (ReadsEntropy, r"ReadsEntropy cannot be run on a batch .*: TypeError: .*Needs"),
        (ReturnsATensor, r"ReturnsATensor\.assign_credit returns a Tensor; it must return Credit"),
        (ForgetsTheTokens, r"Credit\.advantages is \(6,\); .* here 12"),
    ],
)
def test_what_is_wrong_with_a_method_is_said_in_one_sentence(method: type, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rehearse(method())
