"""From prompts to a batch: who takes part, what is made up for, what is counted."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from megasd.algorithms.grpo import GRPO
from megasd.data.prompts import Prompts
from megasd.loop.experience import Collector
from megasd.metrics.phases import Phases
from megasd.process.errors import TryAgainError
from megasd.rewards.config import RewardConfig
from megasd.rollout.config import RolloutConfig
from megasd.rollout.engine import Request
from megasd.types import Prompt, Rollout, Verdict

GROUP_SIZE = 2


class FakeFleet:
    """A response is as long as its prompt's index plus one; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        self.requests += requests
        return [
            Rollout(
                prompt=request.prompt,
                group_id=request.group_id,
                sample=request.sample,
                token_ids=np.full(request.prompt.index + 1, request.sample),
                logprobs=np.full(request.prompt.index + 1, -1.0, dtype=np.float32),
                text="",
                finish_reason="stop",
                policy_version=0,
            )
            for request in requests
        ]


class FakeScorer:
    def __init__(self, judge: Callable[[Rollout], Verdict]) -> None:
        self.judge = judge

    def score(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        return [self.judge(rollout) for rollout in rollouts]


class Alone:
    """One rank's Spread."""

    def map(self, items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
        return list(work(items))


def collector(
    judge: Callable[[Rollout], Verdict], algorithm: Any, groups: int = 3, rows: int = 6
) -> Collector:
    prompts = [
        Prompt(index=i, messages=(), token_ids=np.array([50 + i]), answer=str(i))
        for i in range(rows)
    ]
    return Collector(
        prompts=Prompts(prompts, seed=0, shuffle=False),
        engines=cast(Any, FakeFleet()),
        scorer=cast(Any, FakeScorer(judge)),
        spread=cast(Any, Alone()),
        algorithm=algorithm,
        needs_rewards=True,
        rollout=RolloutConfig(
            prompts_per_step=groups, group_size=GROUP_SIZE, max_response_tokens=9
        ),
        reward=RewardConfig(),
        minibatches=groups if groups < 3 else 1,
        device=torch.device("cpu"),
        seed=0,
    )


def first_wins(rollout: Rollout) -> Verdict:
    return Verdict(reward=float(rollout.sample == 0))


def test_a_batch_lays_responses_end_to_end_with_whole_groups_per_mini_batch() -> None:
    experience = collector(first_wins, GRPO(), groups=2).collect(0, Phases())
    batch = experience.batch
    assert experience.offsets.tolist() == [0, 1, 2, 4, 6]
    assert batch.rollout_ids.tolist() == [0, 1, 2, 2, 3, 3]
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.minibatch_ids.tolist() == [0, 0, 1, 1]
    assert batch.rewards.tolist() == [1, 0, 1, 0]
    assert [view.prompt_ids.tolist() for view in experience.student_views] == [
        [50], [50], [51], [51],
    ]  # fmt: skip


def test_groups_of_equal_rewards_are_sampled_anew_and_the_batch_keeps_its_size() -> None:
    def judge(rollout: Rollout) -> Verdict:  # prompts 0 and 2 teach nothing
        return Verdict(reward=float(rollout.sample == 0 and rollout.prompt.index not in (0, 2)))

    one = collector(judge, GRPO(dynamic_sampling=True))
    experience = one.collect(0, Phases())
    assert sorted({rollout.prompt.index for rollout in experience.rollouts}) == [1, 3, 4]
    assert experience.metrics["rollout/sampled"] == 12.0  # 3 + 3 groups of 2
    assert one.prompts.position == 6, "what was dropped was used up"
    assert len({r.group_id for r in experience.rollouts}) == 3


def teaches(rows: Callable[[int], bool]) -> Callable[[Rollout], Verdict]:
    """Groups of these prompts have different rewards."""
    return lambda r: Verdict(reward=float(r.sample == 0 and rows(r.prompt.index)))


def test_a_refill_samples_as_many_as_the_groups_so_far_say_and_takes_the_first_good_ones() -> None:
    """Three of four teach, and 5 are missing: (5 + sqrt 5) / 0.75 = 9.6 prompts, all at once."""
    one = collector(teaches(lambda row: row % 4 > 0), GRPO(dynamic_sampling=True), 20, rows=60)
    experience = one.collect(0, Phases())
    good = [row for row in range(60) if row % 4 > 0]
    assert [r.prompt.index for r in experience.rollouts[::GROUP_SIZE]] == good[:20]
    assert one.prompts.position == 20 + 10
    assert experience.metrics["rollout/sampled"] == 30 * GROUP_SIZE
    assert experience.batch.group_ids.tolist() == np.repeat(range(20), GROUP_SIZE).tolist()
    again = collector(teaches(lambda row: row % 4 > 0), GRPO(dynamic_sampling=True), 20, rows=60)
    again.prompts.load_state_dict(one.prompts.state_dict())
    both = [(c.collect(1, Phases()), c.prompts.position) for c in (one, again)]
    seeds = [[r.seed for r in cast(Any, c.engines).requests][-20:] for c in (one, again)]
    assert both[0][1] == both[1][1]
    assert seeds[0] == seeds[1], "a resumed run samples the same"


def test_a_refill_is_never_larger_than_the_first_round() -> None:
    one = collector(teaches(lambda row: row == 40), GRPO(dynamic_sampling=True), 8, rows=60)
    one.collect(0, Phases())
    rounds = [r.group_id // 8 for r in cast(Any, one.engines).requests[::GROUP_SIZE]]
    assert rounds == np.repeat(range(11), 8).tolist()


def test_the_last_round_takes_groups_that_teach_before_those_that_do_not() -> None:
    algorithm = GRPO(dynamic_sampling=True, max_refills=1)
    one = collector(teaches(lambda row: row in (0, 2, 6)), algorithm, 4, rows=12)
    taken = [r.prompt.index for r in one.collect(0, Phases()).rollouts[::GROUP_SIZE]]
    assert taken == [0, 2, 4, 6]


def test_groups_lost_to_verifier_errors_are_not_made_up_for_but_others_are() -> None:
    """Rows 1 and 9 break, 0 and 2 teach nothing: of 6 groups one is lost and 2 are missing."""

    def judge(rollout: Rollout) -> Verdict:
        if rollout.prompt.index in (1, 9):
            return Verdict(error="it broke")
        return teaches(lambda row: row > 2)(rollout)

    one = collector(judge, GRPO(dynamic_sampling=True), 6, rows=20)
    taken = [r.prompt.index for r in one.collect(0, Phases()).rollouts[::GROUP_SIZE]]
    assert taken == [3, 4, 5, 6, 7]


def test_a_verifiers_failure_leaves_the_batch_and_is_counted_never_a_zero() -> None:
    def judge(rollout: Rollout) -> Verdict:
        if rollout.prompt.index == 1 and rollout.sample == 1:
            return Verdict(error="it broke")
        return Verdict(reward=1.0)

    experience = collector(judge, GRPO()).collect(0, Phases())
    assert experience.metrics["reward/errors"] == 1.0
    assert experience.metrics["reward/mean"] == 1.0, "a silent 0 would lower it"
    assert len(experience.rollouts) == 5
    assert experience.metrics["reward/equal_groups"] == 1.0


def test_groups_whose_rewards_are_all_equal_are_counted_among_all_that_was_sampled() -> None:
    def judge(rollout: Rollout) -> Verdict:
        return Verdict(reward=float(rollout.sample == 0 and rollout.prompt.index == 1))

    metrics = collector(judge, GRPO()).collect(0, Phases()).metrics
    assert metrics["reward/equal_groups"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("left", [1, 2, 3, 4, 5])
def test_where_verifiers_leave_too_few_groups_as_many_mini_batches_as_can_be_have_one(
    left: int,
) -> None:
    one = collector(
        lambda r: Verdict(error="it broke" if r.prompt.index >= left else None), GRPO(), groups=6
    )
    one.minibatches = 4
    ids = one.collect(0, Phases()).batch.minibatch_ids.tolist()
    assert ids == sorted(ids)
    assert len(set(ids)) == min(left, 4)
    assert set(ids) <= set(range(4))


def test_a_step_in_which_every_verifier_fails_stops_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"step 4: all 6 rollouts .*it broke.*data\.verifier"):
        collector(lambda _: Verdict(error="it broke"), GRPO()).collect(4, Phases())


def test_a_verifier_that_fails_after_it_worked_is_trouble_that_may_pass() -> None:
    verdicts = iter([Verdict(reward=1.0)] * 6 + [Verdict(error="service away")] * 6)
    one = collector(lambda _: next(verdicts), GRPO())
    one.collect(0, Phases())
    with pytest.raises(TryAgainError, match=r"step 1: all 6 rollouts .*service away"):
        one.collect(1, Phases())


def test_seeds_differ_between_samples_prompts_and_steps_and_repeat_with_the_run() -> None:
    def seeds(step: int) -> list[int]:
        one = collector(first_wins, GRPO())
        one.collect(step, Phases())
        return [request.seed for request in cast(Any, one.engines).requests]

    assert len({*seeds(0), *seeds(1)}) == 12
    assert seeds(0) == seeds(0)


def test_a_row_that_comes_twice_in_a_batch_is_sampled_with_other_seeds() -> None:
    """Fewer rows than prompts, or the turn of an epoch: two groups, not one group twice."""

    def seeds(rows: list[int]) -> list[tuple[int, int]]:
        one = collector(first_wins, GRPO())
        prompts = [one.prompts.rows[row] for row in rows]
        one._sample(prompts, step=0, refills=0)
        return [(r.prompt.index, r.seed) for r in cast(Any, one.engines).requests]

    twice = seeds([1, 0, 1])
    assert len(set(twice)) == 3 * GROUP_SIZE
    assert set(seeds([0, 1])) < set(twice), "whatever else is sampled beside it"


def test_what_is_right_is_decided_before_a_reward_is_rounded() -> None:
    """1 - 1e-9 is 1 in float32: right for the method and wrong for the teacher's sources."""
    nearly = 1 - 1e-9
    batch = collector(lambda _: Verdict(reward=nearly), GRPO()).collect(0, Phases()).batch
    assert batch.rewards.tolist() == [1.0] * 6
    assert not batch.is_correct.any()
    assert Verdict(reward=nearly).is_wrong(1.0)
    assert not Verdict(reward=1.0, error="it broke").is_right(1.0)
