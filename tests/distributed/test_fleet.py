"""Engines may die at any moment: no rollout is lost, none has old weights, no rank waits."""

import pytest

from megasd.testing.ranks import RankError, Ranks
from tests.distributed import fleet_cases as cases

EVERY_ROLLOUT_OF_EVERY_STEP = [[(sample, version) for sample in range(9)] for version in range(3)]


@pytest.mark.parametrize(
    ("deaths", "restarts"),
    [
        ({}, 0),
        ({0: [("generate", 1)]}, 1),
        ({0: [("generate", 2)], 1: [("generate", 2)]}, 2),
        ({1: [("load", 1), ("load", 2), ("generate", 3)]}, 3),
    ],
)
def test_a_lost_engine_comes_back_with_the_same_weights_and_does_what_it_still_owed(
    ranks: Ranks, deaths: dict[int, list[tuple[str, int]]], restarts: int
) -> None:
    results = ranks.run(cases.live_through, deaths, world_size=4)
    for result in results:
        assert result["seen"] == EVERY_ROLLOUT_OF_EVERY_STEP
        assert result["metrics"]["engine/restarts"] == restarts
        assert result["metrics"]["speed"] == 2.0
        assert result["metrics"]["queue_max"] == 1.0
    answered = results[0]["answered"] + results[2]["answered"]
    assert sorted(answered) == sorted([*range(9)] * 3)  # none twice
    if not deaths:  # at the first sync, and at every second one
        assert results[0]["checks"] == [True, False, True]


def test_no_deadline_of_collectives_ends_a_wait_for_an_engine_or_a_reward(ranks: Ranks) -> None:
    assert ranks.run(cases.outlast_the_deadline, world_size=4) == [[0, 1, 2, 3]] * 4


def test_ranks_make_room_for_what_is_said_not_for_as_much_from_everyone(ranks: Ranks) -> None:
    for heard, made in ranks.run(cases.hear_of_large_results, world_size=4):
        assert heard == [7, 8]
        assert 2 * 2**20 < made < 2.1 * 2**20


def test_figures_of_a_step_are_of_all_its_attempts(ranks: Ranks) -> None:
    for metrics in ranks.run(cases.sample_through_a_death, world_size=4):
        assert metrics["share_max"] == 4.0
        # Nine tokens, by a clock: not what an engine says of its last share.
        assert 0 < metrics["engine/tokens_per_second"] < 1e9


def test_an_engine_that_dies_again_and_again_ends_the_run_with_its_reasons(ranks: Ranks) -> None:
    always = [("load", attempt) for attempt in range(1, 9)]
    with pytest.raises(RankError) as failure:
        ranks.run(cases.live_through, {1: always}, world_size=4)
    assert str(failure.value).count("engine 1: engine 1 died while loading") == 4


def test_weights_that_an_engine_refuses_end_the_run_on_every_rank(ranks: Ranks) -> None:
    with pytest.raises(RankError) as failure:
        ranks.run(cases.live_through, {0: [("refuse", 2)]}, world_size=4)
    assert str(failure.value).count("rank 0 failed") == 4
    assert "w9 is missing" in str(failure.value)


def test_an_engine_that_computes_something_else_ends_the_run_on_every_rank(ranks: Ranks) -> None:
    assert ranks.run(cases.compare_on_a_probe, 0.005, world_size=4) == pytest.approx([0.005] * 4)
    with pytest.raises(RankError) as failure:
        ranks.run(cases.compare_on_a_probe, 0.5, world_size=4)
    sentence = "engine 1 and the trainer disagree on the same weights: their log-probs differ"
    assert str(failure.value).count(sentence) == 4
