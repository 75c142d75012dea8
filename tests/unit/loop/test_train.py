"""The loop itself, with everything that it calls stood in for."""

import weakref
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megasd.loop import train as module
from megasd.loop.train import Job, train
from megasd.metrics.phases import Phases


class Thing:
    """Something of a step that takes memory."""

    def __init__(self, alive: "weakref.WeakSet[Thing]", **values: Any) -> None:
        vars(self).update(values)
        alive.add(self)


def a_job(steps: int) -> tuple[Job, list[int]]:
    """And how many things of the step before are alive, at each step's beginning."""
    alive: weakref.WeakSet[Thing] = weakref.WeakSet()
    left: list[int] = []

    def collect(step: int, phases: Any) -> Thing:
        left.append(len(alive))
        return Thing(alive, metrics={"rollout/tokens": 1.0}, student_views=[], offsets=np.zeros(1))

    nothing: Any = lambda *_, **__: None  # noqa: E731
    metrics: Any = lambda *_, **__: {}  # noqa: E731
    job = SimpleNamespace(
        algorithm=SimpleNamespace(assign_credit=lambda batch, step: Thing(alive)),
        policy=SimpleNamespace(
            update=lambda *_, **__: Thing(alive, outcome="stepped"),
            teacher=SimpleNamespace(after_batch=nothing),
        ),
        engines=SimpleNamespace(feeds_training=True, send=nothing, sleep=nothing, metrics=metrics),
        collector=SimpleNamespace(collect=collect, prompts=SimpleNamespace(epoch=0.0)),
        reader=SimpleNamespace(read=lambda *_: (Thing(alive), {}), remember=metrics),
        evaluator=SimpleNamespace(is_due=lambda step: False),
        checkpoints=SimpleNamespace(next_step=0, save_if_due=nothing),
        metrics=SimpleNamespace(log=nothing),
        diagnostics=SimpleNamespace(stop_if_stuck=nothing),
        health=SimpleNamespace(watch=metrics),
        phases=Phases(),
        steps=steps,
        minibatches=2,
        evaluates_at_end=False,
    )
    return cast(Job, job), left


def test_nothing_of_a_step_is_left_while_the_next_one_samples_and_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hidden states of a teacher take tens of GB: those of two steps never exist together."""
    monkeypatch.setattr(module, "step_metrics", lambda *_: {})
    monkeypatch.setattr(module.interrupt, "raise_if_asked_anywhere", lambda: None)
    job, left = a_job(steps=3)
    assert train(job)
    assert left == [0, 0, 0]
