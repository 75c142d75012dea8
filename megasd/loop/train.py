"""The training loop: one page, in the order things happen. Every rank runs it."""

from dataclasses import dataclass

from megasd.algorithms.base import Algorithm
from megasd.checkpoint.checkpoints import Checkpoints
from megasd.evaluation.evaluator import Evaluator
from megasd.loop.diagnostics import Diagnostics
from megasd.loop.experience import Collector
from megasd.loop.health import Health
from megasd.loop.meter import Meter
from megasd.loop.reading import Reader, step_metrics
from megasd.metrics.phases import Phases
from megasd.metrics.records import Metrics
from megasd.policy.policy import Policy
from megasd.process import interrupt, together
from megasd.rollout.fleet import Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, assembled by megasd/run.py."""

    algorithm: Algorithm
    policy: Policy
    engines: Fleet  # what samples, from the policy's weights
    collector: Collector
    reader: Reader  # student and teacher log-probs
    meter: Meter  # of float8, where there is any
    evaluator: Evaluator
    checkpoints: Checkpoints
    metrics: Metrics
    diagnostics: Diagnostics
    health: Health
    phases: Phases  # where the run is, also for the watchdog
    steps: int
    minibatches: int
    evaluates_at_end: bool


def train(job: Job) -> bool:
    """Train from the first step that is not in a checkpoint to the last, then evaluate.

    False: it was asked to stop; all is saved, and something is still to be done.
    """
    try:
        with interrupt.heeded_by_the_loop():
            _train(job)
    except interrupt.StopError:
        with job.phases("checkpoint"):
            _take_back_memory(job)
            job.checkpoints.save_last_step()
        return False
    return True


def _take_back_memory(job: Job) -> None:
    """Where the trainer's is lent: from engines that may be in the middle of anything."""
    if job.policy.is_parked:
        job.engines.close()
        together.meet()  # one of the ranks of an engine has its process
        job.policy.unpark()


def _train(job: Job) -> None:
    algorithm, policy, phases = job.algorithm, job.policy, job.phases
    for step in range(job.checkpoints.next_step, job.steps):
        values: dict[str, float] = {}
        evaluates = job.evaluator.is_due(step)
        if job.engines.feeds_training or evaluates:
            with phases("sync"):
                policy.park()
                job.engines.send(policy)
        if evaluates:
            with phases("evaluation"):
                values |= job.evaluator.evaluate(step)

        experience = job.collector.collect(step, phases)
        job.engines.sleep()
        interrupt.raise_if_asked_anywhere()  # nothing that a checkpoint keeps has changed yet

        # Student and teacher read the same response tokens after different contexts.
        with phases("score"):
            policy.unpark()
            batch, scored = job.reader.read(experience, step)
            interrupt.raise_if_asked_anywhere()  # the last time that the step can be given up
            credit = algorithm.assign_credit(batch, step)
            scored |= job.reader.remember(credit)
            scored |= job.meter.measure(experience, step)

        with phases("update"):
            views, offsets = experience.student_views, experience.offsets
            updates = [
                policy.update(views, offsets, batch, credit, algorithm, minibatch=minibatch)
                for minibatch in range(job.minibatches)
            ]
            policy.teacher.after_batch(step, updated=any(u.outcome == "stepped" for u in updates))

        values |= scored | job.engines.metrics() | step_metrics(experience, batch, updates)
        values |= job.health.watch(step, values)
        values["data/epoch"] = job.collector.prompts.epoch
        values |= phases.finish_step(experience.metrics["rollout/tokens"])
        job.metrics.log(step, values)
        job.diagnostics.stop_if_stuck(step, experience, batch, credit, updates)
        with phases("checkpoint"):
            job.checkpoints.save_if_due(step, last=step + 1 == job.steps)
        interrupt.raise_if_asked_anywhere()
        del experience, batch, credit, updates  # of the step's memory nothing is left to the next

    if job.evaluates_at_end:
        with phases("sync"):
            policy.park()
            job.engines.send(policy)
        with phases("evaluation"):
            values = job.evaluator.evaluate(job.steps)
        job.metrics.log(job.steps, values)
        interrupt.raise_if_asked_anywhere()
