"""Whether the limits of a job leave time for its work, by the planner's estimate of a step.

The estimate stands on published figures and assumed shares of them (planner/hardware.py), none of
them measured; it is refused only what no share could make possible, the rest is a warning.
"""

import dataclasses
import math
from dataclasses import dataclass

from megasd.configuration.load import Config
from megasd.launch.checks import Nodes
from megasd.launch.site import LEAD_SECONDS, Site, seconds
from megasd.planner.hardware import shown

SHORT = 0.1  # of the maximal lengths: shorter than any run's mean


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds, estimated."""

    gpu: str  # that they are estimated for
    step: float  # of a mean step
    shortest_step: float  # of one whose sequences are `SHORT`
    longest_work: float  # what a stop waits for: the rest of a score and an update, at full length
    save: float
    deadlines: tuple[str, ...] = ()  # of the run itself that a step outlasts, as sentences

    @property
    def stop(self) -> float:
        """From the signal to the end of the ranks, at most: a rollout is left at once."""
        return self.longest_work + self.save


def estimate(config: Config, nodes: Nodes, gpu: str | None) -> Timing | None:
    """Without a GPU named, of the quickest there is: it takes at least as long. None: unknown."""
    if config.run.device != "cuda":
        return None
    from megasd.planner.around import checkpoint_bytes, deadlines
    from megasd.planner.command import scenario_of
    from megasd.planner.duration import Duration, duration
    from megasd.planner.hardware import GB, GPUS, Assumptions, Machine
    from megasd.planner.memory import memory
    from megasd.planner.search import faults

    known = GPUS[gpu] if gpu else max(GPUS.values(), key=lambda one: one.bf16_flops)
    machine = Machine(gpu=known, count=nodes.ranks)
    scenario, _ = scenario_of(config, machine, Assumptions())
    if faults(scenario):
        return None

    def of(mean_length: float) -> Duration:
        assumed = dataclasses.replace(scenario.assumed, mean_length=mean_length)
        of_length = dataclasses.replace(scenario, assumed=assumed)
        return duration(of_length, memory(of_length), with_sync=False)

    full, mean = of(1.0), of(scenario.assumed.mean_length)
    return Timing(
        gpu=known.name,
        step=mean.total,
        shortest_step=of(SHORT).total,
        longest_work=full.score + full.update,
        save=checkpoint_bytes(scenario) / (nodes.train * scenario.assumed.storage_gb * GB),
        deadlines=tuple(deadlines(scenario, mean)),
    )


def choose_lead(timing: Timing | None, site: Site) -> int:
    """The site's own; else as long as a stop takes, but no more than half of the time limit."""
    if site.signal_lead_seconds is not None:
        return site.signal_lead_seconds
    needed = _lead(timing) if timing else LEAD_SECONDS
    half = (seconds(site.time) or math.inf) / 2
    return int(max(LEAD_SECONDS, min(needed, half)))


def _lead(timing: Timing) -> int:
    """Whole minutes; the job script ends the ranks half a minute before the limit."""
    return 60 * math.ceil((timing.stop + 30) / 60)


def check_times(timing: Timing, config: Config, site: Site) -> tuple[list[str], list[str]]:
    """Errors and warnings, as sentences; `site` with its lead chosen."""
    limit, lead = seconds(site.time) or math.inf, site.signal_lead_seconds or LEAD_SECONDS
    on = f"by the planner's estimate for {timing.gpu}"
    if timing.shortest_step > limit - lead:
        return [
            f"time: the limit of {shown(limit)} ends before a first step does: even with prompts "
            f"and responses of {SHORT:.0%} of their maximal lengths one takes "
            f"{shown(timing.shortest_step)}, {on}; raise --time, take more nodes, or lower "
            "rollout.prompts_per_step"
        ], []
    warnings = []
    if timing.step > limit - lead:
        warnings.append(
            f"time: one step takes about {shown(timing.step)}, {on}, and the limit of "
            f"{shown(limit)} leaves {shown(limit - lead)}: a job may end without a step; raise "
            "--time, or take more nodes"
        )
    if timing.stop + 30 > lead:
        warnings.append(
            f"signal_lead_seconds: {lead} s before the limit the ranks are told to stop, which may "
            f"take {shown(timing.stop)} (score and update {shown(timing.longest_work)}, save "
            f"{shown(timing.save)}), {on}: what was not saved is lost; set it to {_lead(timing)}"
        )
    every = min(config.checkpoint.every or math.inf, config.run.steps)
    minutes = config.checkpoint.minutes
    by_time = math.inf if minutes is None else 60 * minutes + timing.step
    between = min(every * timing.step, by_time)
    if between > limit - lead:
        fitting = int((limit - lead) / 2 / timing.step)
        remedy = f"set checkpoint.every to {fitting} or less" if fitting else "raise --time"
        warnings.append(
            f"checkpoint.every: from one checkpoint to the next (also by checkpoint.minutes) takes "
            f"{shown(between)}, {on}, and a job has {shown(limit - lead)}: one that crashes loses "
            f"all of it; {remedy}"
        )
    return [], [*warnings, *(f"{said} ({on})" for said in timing.deadlines)]
