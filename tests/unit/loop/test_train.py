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


class Stage:
    """Everything that a loop calls, and what it called: names of methods, in order."""

    def __init__(self, steps: int, *, stops_in: str = "") -> None:
        self.alive: weakref.WeakSet[Thing] = weakref.WeakSet()
        self.left: list[int] = []  # things of the step before, at each step's beginning
        self.called: list[str] = []
        self.stops_in = stops_in
        self.policy = SimpleNamespace(
            park=self._notes("park", is_parked=True),
            unpark=self._notes("unpark", is_parked=False),
            is_parked=False,
            update=lambda *_, **__: Thing(self.alive, outcome="stepped"),
            teacher=SimpleNamespace(after_batch=lambda *_, **__: None),
        )
        engines = SimpleNamespace(feeds_training=True, metrics=dict)
        for name in ("send", "sleep", "close"):
            setattr(engines, name, self._notes(name))
        nothing: Any = lambda *_, **__: None  # noqa: E731
        job = SimpleNamespace(
            algorithm=SimpleNamespace(assign_credit=lambda *_: Thing(self.alive)),
            policy=self.policy,
            engines=engines,
            collector=SimpleNamespace(collect=self.collect, prompts=SimpleNamespace(epoch=0.0)),
            reader=SimpleNamespace(read=self.read, remember=lambda _: {}),
            meter=SimpleNamespace(measure=lambda *_: {}),
            evaluator=SimpleNamespace(is_due=lambda step: False),
            checkpoints=SimpleNamespace(
                next_step=0, save_if_due=nothing, save_last_step=self._notes("save")
            ),
            metrics=SimpleNamespace(log=nothing),
            diagnostics=SimpleNamespace(stop_if_stuck=nothing),
            health=SimpleNamespace(watch=lambda *_: {}),
            phases=Phases(),
            steps=steps,
            minibatches=2,
            evaluates_at_end=False,
        )
        self.job = cast(Job, job)

    def _notes(self, name: str, **changes: bool) -> Any:
        def note(*_: Any) -> None:
            self.called.append(name)
            vars(self.policy).update(changes)

        return note

    def _stop_in(self, place: str) -> None:
        self.called.append(place)
        if place == self.stops_in:
            raise module.interrupt.StopError

    def collect(self, step: int, phases: Any) -> Thing:
        self.left.append(len(self.alive))
        self._stop_in("collect")
        metrics = {"rollout/tokens": 1.0}
        return Thing(self.alive, metrics=metrics, student_views=[], offsets=np.zeros(1))

    def read(self, experience: Thing, step: int) -> tuple[Thing, dict[str, float]]:
        self._stop_in("read")
        return Thing(self.alive), {}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "step_metrics", lambda *_: {})
    monkeypatch.setattr(module.interrupt, "raise_if_asked_anywhere", lambda: None)
    monkeypatch.setattr(module.together, "meet", lambda: None)


def test_nothing_of_a_step_is_left_while_the_next_one_samples_and_scores() -> None:
    """Hidden states of a teacher take tens of GB: those of two steps never exist together."""
    stage = Stage(steps=3)
    assert train(stage.job)
    assert stage.left == [0, 0, 0]


def test_the_trainers_memory_is_lent_from_before_engines_wake_until_they_sleep() -> None:
    stage = Stage(steps=2)
    train(stage.job)
    assert stage.called == ["park", "send", "collect", "sleep", "unpark", "read"] * 2


@pytest.mark.parametrize(
    ("place", "then"),
    [("collect", ["close", "unpark", "save"]), ("read", ["save"])],
)
def test_a_run_that_is_stopped_has_its_memory_back_before_it_saves(
    place: str, then: list[str]
) -> None:
    stage = Stage(steps=2, stops_in=place)
    assert not train(stage.job)
    assert stage.called[stage.called.index(place) + 1 :] == then
