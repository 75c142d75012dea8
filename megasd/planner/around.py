"""What a run takes beside the memory and time of its GPUs, and whether its deadlines leave time.

Checkpoints as the trainer writes them: a copy in the hosts' memory while training stands still,
then files beside it. Rollouts travel as objects, and every rank ends up with all of them.
"""

import math
from dataclasses import dataclass, replace

from megasd.planner.buffers import total_parameters
from megasd.planner.duration import Duration, duration
from megasd.planner.hardware import GB, GPUS_PER_NODE, shown
from megasd.planner.memory import Memory, Scenario, memory

# Of a response token: its id (4) and log-prob (4), and the text of its response.
OBJECT_BYTES = 11.5


@dataclass(frozen=True, kw_only=True)
class Around:
    checkpoint_bytes: int  # of one, on the disk
    kept_bytes: int  # of those that are kept, while one more is written
    writing_seconds: float  # of a checkpoint, beside the training
    pausing_seconds: float  # for which training stands still
    host_bytes: int  # of the fullest node: a checkpoint's copy, rollouts and parked state
    rollout_bytes: int  # a step's rollouts, as each rank hears them
    run_seconds: float  # without evaluations
    warnings: list[str]


def around(scenario: Scenario, memory: Memory, time: Duration) -> Around:
    """`memory` and `time` of the scenario."""
    config, assumed, machine = scenario.config, scenario.assumed, scenario.machine
    size = checkpoint_bytes(scenario)
    copied = _copied_bytes(scenario, memory)
    writing = size / (machine.nodes * assumed.storage_gb * GB)
    pausing = max(copied) / (assumed.host_gb * GB)
    rollouts = scenario.rollouts * scenario.mean_response * OBJECT_BYTES
    ranks = min(machine.count, GPUS_PER_NODE)
    parked = max(0, memory.parked - memory.gradients)
    interval = _interval(scenario, time)
    saves = config.run.steps * time.total / interval
    return Around(
        checkpoint_bytes=size,
        kept_bytes=size * (config.checkpoint.keep + 1),
        writing_seconds=writing,
        pausing_seconds=pausing,
        host_bytes=int(sum(copied) + ranks * (rollouts + parked)),
        rollout_bytes=int(rollouts),
        run_seconds=config.run.steps * time.total + saves * (pausing + max(0, writing - interval)),
        warnings=[*_slow_writing(writing, interval), *deadlines(scenario, time)],
    )


def checkpoint_bytes(scenario: Scenario) -> int:
    """Weights, what the optimizer keeps of each, and the teacher's where it is not the policy's."""
    e = scenario.dtype_bytes
    teacher = {"snapshot": e, "frozen": e, "ema": 4}.get(scenario.config.teacher.weights, 0)
    states = 3 if e < 4 else 2
    return total_parameters(scenario.model) * (e + 4 * states + teacher)


def _copied_bytes(scenario: Scenario, held: Memory) -> list[int]:
    """Of each rank of the first node: its share of the optimizer's state, and of the weights that
    it holds like others."""
    parallel = scenario.config.parallel
    writers = max(parallel.tensor, parallel.expert * parallel.ranks_per_expert)
    stays = scenario.config.teacher.weights in ("snapshot", "frozen")
    replicas = max(1, scenario.machine.count // parallel.pipeline // writers)
    once = held.weights * (2 if stays else 1) // replicas
    average = held.optimizer // 3 if scenario.config.teacher.weights == "ema" else 0
    ranks = min(scenario.machine.count, GPUS_PER_NODE)
    return [held.optimizer + average + once] * ranks


def _interval(scenario: Scenario, time: Duration) -> float:
    """Seconds from one checkpoint to the next; the last one is always written."""
    config = scenario.config.checkpoint
    steps = min(config.every or math.inf, scenario.config.run.steps) * time.total
    return steps if config.minutes is None else min(steps, 60 * config.minutes + time.total)


def _slow_writing(writing: float, interval: float) -> list[str]:
    if writing <= interval:
        return []
    return [
        f"checkpoint.every: writing a checkpoint takes {shown(writing)}, and the next one is due "
        f"after {shown(interval)}: training will wait; raise it, or take quicker storage "
        "(--assume storage_gb=...)"
    ]


def deadlines(scenario: Scenario, time: Duration) -> list[str]:
    """Where a step of the longest prompts and responses outlasts what waits for it; `time`: of a
    mean step."""
    config = scenario.config
    assumed = replace(scenario.assumed, mean_length=1.0)
    longest = replace(scenario, assumed=assumed)
    full = duration(longest, memory(longest), with_sync=False)
    found = []
    waits = max(full.score, full.update / config.optimizer.minibatches_per_step)
    limit = config.parallel.timeout_seconds
    if waits > limit:
        found.append(
            f"parallel.timeout_seconds: at full length a pass over the batch takes up to "
            f"{shown(waits)}, for which a rank that is done first may wait for the others, and a "
            f"collective is given up after {shown(limit)}; raise it above {math.ceil(waits)}"
        )
    watchdog = config.watchdog
    if not watchdog.factor:
        return found
    usual = max(watchdog.minimum_seconds, watchdog.factor * time.total)
    for key, limit, of in (
        ("slow_seconds", max(watchdog.slow_seconds, watchdog.minimum_seconds), "the first step"),
        ("factor", usual, "a later step"),
    ):
        if full.total > limit:
            found.append(
                f"watchdog.{key}: at full length a step takes {shown(full.total)}, and a run in "
                f"which {of} takes {shown(limit)} is ended; raise it"
            )
    return found
