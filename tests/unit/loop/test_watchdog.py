"""When a run counts as hanging, and who is to blame for it."""

import threading
from dataclasses import replace

import pytest

from megasd.configuration.load import WatchdogConfig
from megasd.loop.watchdog import IdleTime, Place, explain, limit_seconds
from megasd.metrics.phases import Phases
from megasd.process.waiting import all_waits, first_of, waiting_for

CONFIG = WatchdogConfig(factor=10.0, minimum_seconds=60.0, slow_seconds=1000.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(phases: Phases, clock: Clock, *seconds: float) -> None:
    for one in seconds:
        clock.now += one
        phases.finish_step(1)


def test_the_limit_is_a_multiple_of_the_median_step() -> None:
    clock = Clock()
    phases = Phases(clock)
    assert limit_seconds(CONFIG, phases) == 1000.0, "the start and the first step"
    steps(phases, clock, 20.0, 30.0, 500.0)
    assert limit_seconds(CONFIG, phases) == 300.0
    assert phases.progress == clock.now
    steps(phases, clock, *[2.0] * 10)
    assert limit_seconds(CONFIG, phases) == 60.0, "no less than the minimum"


def test_an_evaluation_is_compared_with_evaluations_and_a_wait_for_files_with_nothing() -> None:
    clock = Clock()
    phases = Phases(clock)
    steps(phases, clock, 20.0)
    with phases("evaluation"):
        assert phases.progress == clock.now
        assert limit_seconds(CONFIG, phases) == 1000.0
        clock.now += 90.0
    assert phases.progress == clock.now, "the step goes on from here"
    assert limit_seconds(CONFIG, phases) == 200.0
    with phases("evaluation"):
        assert limit_seconds(CONFIG, phases) == 900.0
    with phases("checkpoint"):
        assert limit_seconds(CONFIG, phases) == 200.0
        with waiting_for(lambda: "files", may_take_long=True):
            assert limit_seconds(CONFIG, phases) == 1000.0
        assert limit_seconds(CONFIG, phases) == 200.0


def test_time_in_which_the_process_was_stopped_is_not_idle_time() -> None:
    clock = Clock()
    phases = Phases(clock)
    idle = IdleTime(phases, longest_look=3.0)

    def look_after(seconds: float) -> float:
        clock.now += seconds
        return idle.look()

    assert [look_after(1.0) for _ in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert look_after(7200.0) == 8.0, "suspended, and continued"
    assert look_after(1.0) == 9.0, "a hang from before the pause is still one"
    steps(phases, clock, 0.25)
    assert look_after(0.5) == 0.5, "progress"
    steps(phases, clock, 0.25)
    assert look_after(7200.0) == 3.0, "suspended just after progress"


HOSTS = ["n1", "n1", "n2", "n2"]
WAITS = Place(
    host="n1",
    phase="update",
    begun=12,
    line="policy/update.py:201 in update",
    collective="all_reduce",
    waits_for="",
)


def test_a_rank_that_does_not_answer_is_named_with_its_node() -> None:
    said = explain({0: WAITS, 1: WAITS, 3: replace(WAITS, phase="sync")}, HOSTS)
    assert said.startswith("phase update: rank 2 (node n2) does not answer")
    said = explain({1: WAITS}, HOSTS)
    assert "rank 0 (node n1), rank 2 (node n2), rank 3 (node n2) do not answer" in said


def test_a_rank_that_is_behind_is_named_with_what_it_does() -> None:
    """Whether or not it is in a collective itself: the others are further."""
    reward = replace(WAITS, phase="reward", begun=10, line="rewards/scorer.py:99 in score")
    late = replace(reward, host="n2", waits_for="verdicts on train.jsonl:7 sample 2")
    said = explain({0: WAITS, 1: WAITS, 2: WAITS, 3: late}, HOSTS)
    assert said == (
        "phase update: rank 3 (node n2) is in phase reward at rewards/scorer.py:99 in score, "
        "and waits for verdicts on train.jsonl:7 sample 2; the others wait"
    )


def test_of_ranks_that_are_equally_far_the_one_outside_of_the_collective_is_named() -> None:
    alone = replace(WAITS, collective="", line="policy/forward.py:60 in run")
    said = explain({0: WAITS, 1: alone, 2: WAITS, 3: WAITS}, HOSTS)
    assert said.startswith("phase update: rank 1 (node n1) is in phase update at policy/forward")
    assert said.endswith("; the others wait")


def test_where_nobody_is_in_a_collective_the_odd_one_out_is_named() -> None:
    result = replace(WAITS, collective="")
    odd = replace(result, line="policy/forward.py:60 in run")
    said = explain({0: odd, 1: result, 2: result, 3: result}, HOSTS)
    assert said.startswith("phase update: rank 0 (node n1) is in phase update at policy/forward")


def test_where_nobody_is_behind_that_is_said() -> None:
    said = explain(dict.fromkeys(range(4), WAITS), HOSTS)
    assert said == (
        "phase update: every rank is at policy/update.py:201 in update in all_reduce; "
        "nobody is behind"
    )


def test_what_a_thread_waits_for_can_be_read_from_another_one() -> None:
    names = [f"sample {i}" for i in range(8)]
    seen: list[str] = []
    with waiting_for(lambda: f"responses to {first_of(names)}"), waiting_for(lambda: "a rank"):
        thread = threading.Thread(target=lambda: seen.append(all_waits()))
        thread.start()
        thread.join()
    assert seen == [
        "responses to sample 0, sample 1, sample 2, sample 3, sample 4 and 3 more; a rank"
    ]
    assert all_waits() == ""


@pytest.mark.parametrize("count", [1, 5])
def test_few_names_are_all_said(count: int) -> None:
    assert first_of(["x"] * count) == ", ".join(["x"] * count)
