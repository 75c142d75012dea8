"""Limits of a job against the planner's estimate of its work."""

import dataclasses
from pathlib import Path

import pytest

from megasd.configuration.load import Config, load_config
from megasd.launch.checks import Nodes
from megasd.launch.site import Site
from megasd.launch.timing import Timing, check_times, choose_lead, estimate

ROOT = Path(__file__).parents[3]
NODES = Nodes(train=1, gpus_per_node=8)
TIMING = Timing(gpu="H200", step=600, shortest_step=90, longest_work=500, save=100)


def with_every(every: int, steps: int = 100, minutes: float | None = None) -> Config:
    config = Config()
    checkpoint = dataclasses.replace(config.checkpoint, every=every, minutes=minutes)
    return dataclasses.replace(
        config, checkpoint=checkpoint, run=dataclasses.replace(config.run, steps=steps)
    )


def warnings(site: Site, config: Config, timing: Timing = TIMING) -> list[str]:
    errors, found = check_times(timing, config, site)
    assert errors == []
    return found


def test_a_lead_is_as_long_as_a_stop_takes_and_at_least_the_usual_one() -> None:
    assert choose_lead(TIMING, Site()) == 660  # 500 + 100, half a minute, in whole minutes
    assert choose_lead(dataclasses.replace(TIMING, longest_work=5), Site()) == 300
    assert choose_lead(TIMING, Site(time="20")) == 600  # no more than half of the limit
    assert choose_lead(TIMING, Site(signal_lead_seconds=400)) == 400
    assert choose_lead(None, Site()) == 300
    assert choose_lead(TIMING, Site(time="UNLIMITED")) == 660


def test_what_may_not_be_done_in_time_is_said_with_what_to_set() -> None:
    enough = Site(signal_lead_seconds=660)
    assert warnings(enough, with_every(20)) == []
    assert warnings(enough, with_every(0, steps=10)) == []  # the run is done within the job
    (said,) = warnings(dataclasses.replace(enough, signal_lead_seconds=400), with_every(20))
    assert said.startswith("signal_lead_seconds: 400 s before the limit")
    assert said.endswith("set it to 660")
    for every in (30, 0):
        (said,) = warnings(enough, with_every(every))
        assert said.startswith("checkpoint.every: ")
        assert said.endswith("set checkpoint.every to 11 or less")
        assert warnings(enough, with_every(every, minutes=30)) == []
    said = warnings(dataclasses.replace(enough, time="20"), with_every(1))[0]
    assert said.startswith("time: one step takes about 600 s, by the planner's estimate for H200")


def test_a_limit_in_which_no_step_can_end_is_an_error() -> None:
    slow = dataclasses.replace(TIMING, shortest_step=15000)
    (error,), _ = check_times(slow, with_every(1), Site(signal_lead_seconds=300))
    assert error.startswith("time: the limit of 4.0 h ends before a first step does")


def test_the_planner_says_how_long_the_shipped_jobs_take() -> None:
    """A save after a USR1 300 s before the limit could not finish in this job."""
    config = load_config(ROOT / "configs/jobs/rlsd_8b_1node.yaml", ["run.device=cuda"])
    timing = estimate(config, NODES, "H200")
    assert timing is not None
    assert timing.shortest_step < timing.step < timing.longest_work + 3600
    assert 300 < timing.stop < 3600
    assert choose_lead(timing, Site()) >= timing.stop + 30
    unnamed = estimate(config, NODES, None)
    assert unnamed is not None
    assert unnamed.step < timing.step  # the quickest there is
    on_cpu = load_config(ROOT / "configs/jobs/rlsd_8b_1node.yaml", ["run.device=cpu"])
    assert estimate(on_cpu, NODES, "H200") is None


def test_a_deadline_of_the_run_that_a_step_outlasts_is_said_before_the_job() -> None:
    items = ["run.device=cuda", "parallel.timeout_seconds=60"]
    config = load_config(ROOT / "configs/jobs/rlsd_8b_1node.yaml", items)
    timing = estimate(config, NODES, "H200")
    assert timing is not None
    site = Site(signal_lead_seconds=3600)
    (said,) = warnings(site, config, timing)
    assert said.startswith("parallel.timeout_seconds: at full length a pass over the batch takes")
    assert said.endswith("(by the planner's estimate for H200)")


@pytest.mark.parametrize("nodes", [1, 4])
def test_saves_are_shared_by_the_nodes(nodes: int) -> None:
    config = load_config(ROOT / "configs/jobs/rlsd_8b_1node.yaml", ["run.device=cuda"])
    timing = estimate(config, dataclasses.replace(NODES, train=nodes), "H200")
    assert timing is not None
    # 8.19e9 parameters: a float32 copy, two moments, and bfloat16 twice with the teacher's.
    assert timing.save == pytest.approx(8.19 * (12 + 2 * 2) / nodes, rel=0.01)
