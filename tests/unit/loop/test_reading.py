"""Who reads what, in which order: only passes that can change the update, on the right rows."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from megasd.algorithms.base import Algorithm, Needs
from megasd.algorithms.dasd import DASD
from megasd.algorithms.entropy_bonus import EntropyBonus
from megasd.algorithms.grpo import GRPO
from megasd.algorithms.rlsd import RLSD
from megasd.loop.experience import Experience
from megasd.loop.reading import Reader, step_metrics
from megasd.losses.config import MismatchConfig
from megasd.metrics.phases import Phases
from megasd.types import (
    Credit,
    Reads,
    ResponseBatch,
    Rollout,
    Scores,
    Support,
    TeacherHidden,
    Verdict,
    View,
)
from tests.unit.loop.test_experience import collector, first_wins


class FakePolicy:
    """Scores -1 for the student and `gap` more for a teacher; remembers what it was asked."""

    def __init__(self, gap: float = 0.25) -> None:
        self.gap = gap
        self.passes: list[tuple[str, list[bool], Reads]] = []

    def score(
        self,
        views: Sequence[View | None],
        offsets: np.ndarray,
        *,
        reads: Reads | None = None,
        owners: np.ndarray | None = None,
    ) -> Scores:
        return self._score("student", -1.0, views, int(offsets[-1]), reads, owners)

    def score_teachers(
        self,
        views: Mapping[str, Sequence[View | None]],
        offsets: np.ndarray,
        *,
        reads: Mapping[str, Reads],
        owners: np.ndarray | None = None,
    ) -> dict[str, Scores]:
        value, num_tokens = -1.0 + self.gap, int(offsets[-1])
        return {
            role: self._score(role, value, read, num_tokens, reads.get(role), owners)
            for role, read in views.items()
        }

    def assign_owners(self, lengths: Sequence[int], minibatch_ids: Sequence[int]) -> np.ndarray:
        return np.arange(len(lengths)) % 2

    def _score(
        self,
        who: str,
        value: float,
        views: Sequence[View | None],
        n: int,
        reads: Reads | None,
        owners: np.ndarray | None,
    ) -> Scores:
        reads = reads or Reads()
        self.passes.append((who, [view is not None for view in views], reads))
        self.owners = owners
        ids = torch.full((n, reads.top_k or reads.samples), len(self.passes))
        support = reads.support
        if ids.shape[1]:
            support = Support(ids=ids, teacher_logprobs=None if reads.samples else -ids.float())
        return Scores(
            torch.full((n,), value),
            torch.full((n,), 0.5),
            cross_entropy=torch.full((n,), 3.0) if reads.cross_entropy else None,
            support=support,
            hidden=TeacherHidden(hidden=torch.ones(n, 2), weight=torch.ones(5, 2))
            if reads.hidden
            else None,
        )

    @property
    def order(self) -> list[str]:
        return [who for who, _, _ in self.passes]


class FakeContext:
    """Prompt 1 has a text but no room for it; wrong siblings exist for odd samples only."""

    num_cut = 0
    num_without_room = 0

    def texts(
        self, role: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], step: int
    ) -> list[str | None]:
        assert len(rollouts) == len(verdicts)
        return [
            None if role == "wrong[0]" and rollout.sample % 2 == 0 else role for rollout in rollouts
        ]

    def view(self, rollout: Rollout, text: str) -> View | None:
        if rollout.prompt.index == 1 and text:
            self.num_without_room += 1
            return None
        return View(prompt_ids=np.array([1, 2]), response_ids=rollout.token_ids)


class Asks(Algorithm):
    """An algorithm that is nothing but its needs."""

    def __init__(self, **needs: Any) -> None:
        object.__setattr__(self, "_needs", Needs(**needs))

    @property
    def needs(self) -> Needs:
        return self._needs  # pyright: ignore[reportAttributeAccessIssue]

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        raise NotImplementedError

    def token_loss(self, student: Any, batch: Any, credit: Any) -> Any:
        raise NotImplementedError


def an_experience(judge: Callable[[Rollout], Verdict] = first_wins, groups: int = 3) -> Experience:
    return collector(judge, GRPO(), groups=groups).collect(0, Phases())


def reader(
    policy: FakePolicy, algorithm: Any, minibatches: int = 1, mismatch: MismatchConfig | None = None
) -> Reader:
    return Reader(
        cast(Any, policy),
        algorithm,
        cast(Any, FakeContext()),
        minibatches=minibatches,
        mismatch=mismatch or MismatchConfig(),
        seed=7,
        memory={},
    )


def test_only_rollouts_whose_advantage_is_not_zero_are_read_by_the_teacher() -> None:
    def judge(rollout: Rollout) -> Verdict:  # the group of prompt 2 is all right
        return Verdict(reward=float(rollout.sample == 0 or rollout.prompt.index == 2))

    policy = FakePolicy()
    batch, metrics = reader(policy, RLSD()).read(an_experience(judge), step=0)
    assert policy.order == ["teacher", "student"]
    assert policy.passes[0][1] == [True, True, False, False, False, False]
    assert metrics["teacher/rows_scored"] == pytest.approx(2 / 6)
    assert metrics["teacher/contexts_without_room"] == 2.0
    assert batch.has_context().tolist() == [True, True, False, False, False, False]
    assert batch.teacher_gap().tolist() == [0.25, 0.25, *[0.0] * 10]


def test_no_pass_runs_that_cannot_change_the_update() -> None:
    policy = FakePolicy()
    batch, metrics = reader(policy, RLSD()).read(an_experience(), step=50)  # the mix is 0 by now
    assert policy.passes == []
    assert batch.old_logprobs is None, "the update's own forward pass provides them"
    assert metrics["teacher/rows_scored"] == 0.0
    reader(policy, GRPO()).read(an_experience(), step=0)
    assert policy.passes == []


def test_the_student_is_not_read_for_an_entropy_that_nothing_looks_at() -> None:
    """DASD pushes only where a teacher read something; an entropy bonus of 0 is GRPO."""

    def nothing(*_: Any) -> list[None]:
        return [None] * 6

    for algorithm in (DASD(beta=0.0), DASD(), EntropyBonus(alpha=0.0)):
        policy = FakePolicy()
        one = reader(policy, algorithm)
        cast(Any, one.privileged).texts = nothing  # no rollout has a context
        experience = an_experience()
        batch, _ = one.read(experience, step=0)
        assert policy.passes == []
        credit, plain = (a.assign_credit(batch, 0) for a in (algorithm, GRPO()))
        assert torch.equal(credit.advantages, plain.advantages)
    policy = FakePolicy()
    reader(policy, DASD()).read(an_experience(), step=0)
    assert policy.order == ["teacher", "student"]


@pytest.mark.parametrize(
    "why",
    [
        {"minibatches": 2},
        {"mismatch": MismatchConfig(level="sequence")},
        {"mismatch": MismatchConfig(reject=(0.5, 2.0))},
    ],
)
def test_the_old_policy_is_scored_where_the_update_must_know_it_before(why: dict) -> None:
    policy = FakePolicy()
    batch, _ = reader(policy, GRPO(), **why).read(an_experience(), step=0)
    assert policy.order == ["student"]
    assert batch.old_logprobs is not None


def test_a_reference_reads_every_rollout_after_the_plain_prompt() -> None:
    policy = FakePolicy()
    one = reader(policy, GRPO(kl_coef=0.1))
    one.privileged = None  # as where no role reads a privileged context
    batch, _ = one.read(an_experience(), step=0)
    assert policy.order == ["reference"], "its gap is not looked at before the update"
    assert policy.passes[0][1] == [True] * 6
    assert batch.teachers["reference"].logprobs.tolist() == [-0.75] * 12


def test_a_student_that_chooses_the_support_is_read_before_the_teacher() -> None:
    policy = FakePolicy()
    asks = Asks(teachers=("teacher",), old_logprobs=False, support="student", support_size=3)
    batch, _ = reader(policy, asks).read(an_experience(), step=0)
    assert policy.order == ["student", "teacher"]
    assert policy.passes[0][2].top_k == 3
    assert policy.passes[1][2].support is not None
    assert batch.support is not None
    assert batch.support.ids.tolist() == [[1, 1, 1]] * 12, "the first pass's ids"
    assert batch.old_logprobs is not None, "read already, so it is used"


def test_a_teacher_that_chooses_is_read_first_and_the_student_at_its_ids() -> None:
    policy = FakePolicy()
    asks = Asks(teachers=("teacher",), support="teacher", support_size=2, cross_entropy=True)
    batch, _ = reader(policy, asks).read(an_experience(), step=0)
    assert policy.order == ["teacher", "student"]
    student = policy.passes[1][2]
    assert student.cross_entropy
    assert student.support is batch.support
    cross_entropy = batch.teachers["teacher"].cross_entropy
    assert cross_entropy is not None
    # prompt 1 has no room for its context: tokens 2 to 5
    assert cross_entropy.tolist() == [3.0] * 2 + [0.0] * 4 + [3.0] * 6


def test_a_distribution_alone_needs_no_pass_of_the_old_policy() -> None:
    for asks in (
        {"teacher_hidden": True},
        {"support": "teacher", "support_size": 2},
        {"support": "samples", "support_size": 2},
    ):
        policy = FakePolicy()
        method = Asks(teachers=("teacher",), old_logprobs=False, **asks)
        batch, _ = reader(policy, method).read(an_experience(), step=3)
        assert policy.order == ["teacher"]
        assert (batch.support is None) == ("support" not in asks)
        assert (batch.teacher_hidden is None) == ("teacher_hidden" not in asks)
        assert policy.passes[0][2].seed == ((7, 3) if "samples" in asks.values() else (0,))


def test_passes_that_leave_values_behind_run_where_the_rollout_is_owned() -> None:
    policy = FakePolicy()
    asks = Asks(teachers=("teacher",), support="teacher", support_size=2)
    batch, _ = reader(policy, asks).read(an_experience(), step=0)
    assert batch.owners is not None
    assert batch.owners.tolist() == [0, 1, 0, 1, 0, 1]
    assert policy.owners is not None
    batch, _ = reader(policy, RLSD()).read(an_experience(), step=0)
    assert batch.owners is None, "single numbers travel: every pass is balanced by itself"


def test_each_role_reads_its_own_context_and_has_its_own_gap() -> None:
    policy = FakePolicy()
    batch, _ = reader(policy, Asks(teachers=("teacher", "wrong[0]"))).read(an_experience(), step=0)
    assert policy.order == ["teacher", "wrong[0]", "student"]
    assert batch.has_context("wrong[0]").tolist() == [False, True, False, False, False, True]
    assert batch.teacher_gap("wrong[0]").tolist() == [0.0, 0.25, *[0.0] * 7, *[0.25] * 3]


def test_memory_passes_from_one_step_s_credit_to_the_next_step_s_batch() -> None:
    one = reader(FakePolicy(), GRPO())
    experience = an_experience()
    credit = GRPO().assign_credit(experience.batch, 0)
    logged = one.remember(credit._replace(metrics={"lam": 0.5}, memory={"x": torch.ones(1)}))
    assert logged == {"credit/lam": 0.5}
    batch, _ = one.read(experience, step=1)
    assert batch.memory["x"].item() == 1
    one.remember(credit)
    assert one.memory == {}


def an_update(outcome: str = "stepped", **values: Any) -> Any:
    """As of one whose own forward read nothing that is kept."""
    nothing = {"metrics": {}, "logprobs": None, "read": None}
    return SimpleNamespace(outcome=outcome, **{**nothing, **values})


DISTANCES = {"teacher/reference/gap_max", "mismatch/abs_mean", "mismatch/abs_p99"}


def test_what_a_pass_read_is_measured_over_all_response_tokens() -> None:
    """Whatever the update learns from: the same name is the same tokens."""
    experience = an_experience()
    one = reader(FakePolicy(gap=0.5), GRPO(kl_coef=0.1), minibatches=2)
    batch, _ = one.read(experience, step=0)
    assert batch.old_logprobs is not None
    batch.old_logprobs[4:] -= 1
    values = {"loss": 1.0, "entropy": 0.25}
    measured = step_metrics(experience, batch, [an_update(metrics=values), an_update("empty")])
    assert measured["policy/entropy"] == 0.5, "of the pass"
    assert measured["update/entropy"] == 0.25, "of the update"
    assert measured["teacher/reference/gap_mean"] == pytest.approx((4 * 0.5 + 8 * 1.5) / 12)
    assert measured.keys() >= DISTANCES
    assert not any(name.startswith(("update/teacher", "update/mismatch")) for name in measured)


def test_what_only_the_update_read_is_of_the_tokens_that_it_learns_from_and_says_so() -> None:
    experience = an_experience()
    batch, _ = reader(FakePolicy(gap=0.5), GRPO(kl_coef=0.1)).read(experience, step=0)
    assert batch.old_logprobs is None
    read = torch.arange(12) < 8  # a group whose rewards are equal is not run
    logprobs = torch.where(read, -1.5, 0.0)
    first = an_update(metrics={"entropy": 0.75}, logprobs=logprobs, read=read)
    measured = step_metrics(experience, batch, [first])
    assert measured["update/teacher/reference/gap_mean"] == pytest.approx(1.0)
    assert measured["update/entropy"] == 0.75
    assert measured.keys() >= {f"update/{name}" for name in DISTANCES}
    others = {name.split("/")[0] for name in measured} - {"update"}
    assert not others & {"policy", "teacher", "mismatch"}


def test_mini_batches_that_teach_nothing_are_counted_and_have_no_loss() -> None:
    experience = an_experience()
    batch, _ = reader(FakePolicy(), GRPO()).read(experience, step=0)
    measured = step_metrics(experience, batch, [an_update("empty")])
    updates = {name: value for name, value in measured.items() if name.startswith("update/")}
    assert updates == {"update/skipped": 0.0, "update/empty_minibatches": 1.0}
    some = [an_update("empty"), an_update("skipped", metrics={"loss": 2.0})]
    measured = step_metrics(experience, batch, some)
    assert measured["update/loss"] == 2.0
    assert (measured["update/skipped"], measured["update/empty_minibatches"]) == (1.0, 1.0)
