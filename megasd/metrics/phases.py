"""Where the seconds of a step go."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, get_args

Phase = Literal["rollout", "reward", "score", "update", "sync", "evaluation", "checkpoint"]
MODEL_PHASES: tuple[Phase, ...] = ("rollout", "score", "update", "sync")
_REMEMBERED = 32  # durations, for what is usual


class Phases:
    """`with phases("rollout"):` adds to a phase; `finish_step` reports them and starts anew.

    Seconds of the wall clock on this rank, waiting for other ranks included. Phases do not nest:
    a second that counts twice would hide one that is lost. Other threads may read the attributes.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.current: Phase | None = None
        self.begun = 0  # phases so far: where every rank is in the same program
        self.progress = clock()  # when a step ended, or an evaluation began or ended
        self.step_seconds: deque[float] = deque(maxlen=_REMEMBERED)  # evaluation left out
        self.evaluation_seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._step_began = self.progress
        self._seconds: dict[Phase, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        assert phase in get_args(Phase), f"{phase} is not one of {get_args(Phase)}"
        assert self.current is None, f"{phase} began inside {self.current}"
        began = self.clock()
        if phase == "evaluation":
            self.progress = began
        self.current = phase
        self.begun += 1
        try:
            yield
        finally:
            now = self.clock()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - began
            if phase == "evaluation":
                self.progress = now
                self.evaluation_seconds.append(now - began)
            self.current = None

    def finish_step(self, num_tokens: float) -> dict[str, float]:
        """`time/<phase>` of the phases that ran, `time/step`, and two figures of speed.

        Both figures leave evaluation out: `speed/outside_model` = 1 - (rollout + score + update
        + sync) / (step - evaluation), and `speed/tokens_per_second`, `num_tokens` (response
        tokens of the step) over the same seconds. What runs after the call, a checkpoint say,
        belongs to the next step.
        """
        now = self.clock()
        wall = now - self._step_began
        training = wall - self._seconds.get("evaluation", 0.0)
        in_model = sum(self._seconds.get(phase, 0.0) for phase in MODEL_PHASES)
        report = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        report["time/step"] = wall
        if training > 0:
            report["speed/outside_model"] = 1.0 - in_model / training
            report["speed/tokens_per_second"] = num_tokens / training
        self.step_seconds.append(training)
        self.progress = self._step_began = now
        self._seconds = {}
        return report
