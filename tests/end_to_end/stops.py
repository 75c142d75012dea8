"""A process that runs `megasd train` several times, and asks it to stop at given moments.

A start is (ARGUMENTS, MOMENT, TIMES); it prints the exit code of each. MOMENT: a phase of a step,
when it begins for the time TIMES; "build" and "export"; "owned": another one runs it; "": none.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megasd.cli import main
from megasd.metrics.phases import Phases
from megasd.process import interrupt, lock
from megasd.testing.ranks import forget_model_parallel


class StoppingPhases(Phases):
    """Asks when the wanted phase has begun."""

    wanted: tuple[str, int] = ("", 0)

    @contextlib.contextmanager
    def __call__(self, phase: Any) -> Iterator[None]:
        with super().__call__(phase):
            name, times = StoppingPhases.wanted
            if phase == name:
                StoppingPhases.wanted = (name, times - 1)
                if times == 1:
                    ask()
            yield


def ask(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    while interrupt._state.asked is None:
        time.sleep(0.001)


def press_ctrl_c(*_: Any, **__: Any) -> None:
    os.killpg(0, signal.SIGINT)
    time.sleep(60)


def run(arguments: list[str], moment: str, times: int) -> int:
    import megasd.run
    from megasd.checkpoint import export

    StoppingPhases.wanted = (moment, times)
    megasd.run.Phases = StoppingPhases
    if moment == "build":
        megasd.run.build_engine = press_ctrl_c
    if moment == "export":
        export.export_hf = ask
    with contextlib.ExitStack() as stack:
        stack.callback(forget_model_parallel)
        if moment == "owned":
            stack.enter_context(lock.take(Path(arguments[1]) / "owner"))
        return main(["train", *arguments])


def run_several(starts: Sequence[tuple[list[str], str, int]]) -> int:
    """The last one's exit code."""
    interrupt.listen()
    code = 0
    for start in starts:
        code = run(*start)
        print("ended with", code, flush=True)
    return code
