"""The live console: a progress bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = {  # label -> metric; a step shows those that it has
    "loss": "update/loss",
    "reward": "reward/mean",
    "accuracy": "reward/accuracy",
    "entropy": "update/entropy",
    "grad norm": "update/grad_norm",
    "tokens/s": "speed/tokens_per_second",
}


class Terminal(RichConsole):
    """Rich's own way with a reader that is gone is to end the process."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that it is called for


class Console:
    """`show` after every step. The bar redraws in its own thread, twice a second at most.

    Elsewhere each step is a line, but steps that are faster than a second share one.
    """

    def __init__(self, name: str, *, first_step: int, total_steps: int) -> None:
        self._total_steps = total_steps
        self._first_step = first_step
        self._began = time.perf_counter()
        self._last_line = -math.inf
        self._terminal = Terminal(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._terminal.is_terminal:
            self._bar = Progress(
                TextColumn(name),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._terminal,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task(
                name, total=total_steps, completed=first_step, values=""
            )
            self._bar.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """One step that is done; held-out accuracy gets a line of its own."""
        if "evaluation/accuracy" in values:
            self._print(f"step {step}  held-out accuracy {_with_interval(values)}")
        if step == self._total_steps:  # the row after the last step holds the evaluation only
            return
        text = "  ".join(
            f"{label} {values[key]:.4g}" for label, key in SHOWN.items() if key in values
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, values=text)
        elif time.perf_counter() - self._last_line >= 1.0 or step + 1 == self._total_steps:
            self._last_line = time.perf_counter()
            self._print(f"step {step + 1}/{self._total_steps}  {text}  eta {self._eta(step)}")

    def say(self, sentence: str) -> None:
        self._print(sentence)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        self._terminal.print(line, markup=False)

    def _eta(self, step: int) -> str:
        """Remaining time at the pace of this process so far, as h:mm:ss."""
        per_step = (time.perf_counter() - self._began) / (step + 1 - self._first_step)
        seconds = round(per_step * (self._total_steps - step - 1))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _with_interval(values: Mapping[str, float]) -> str:
    low, high = values["evaluation/accuracy_low"], values["evaluation/accuracy_high"]
    return f"{values['evaluation/accuracy']:.3f}  95% interval [{low:.3f}, {high:.3f}]"
