"""Runs one `megasd train` after the other, each in a process of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megasd.compare.runs import Comparison, Run
from megasd.configuration.load import to_yaml
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.metrics.run_folder import CONFIG_FILE
from megasd.process import lock
from megasd.process.errors import TryAgainError

POLL_SECONDS = 1.0


def execute(comparison: Comparison) -> dict[Path, str]:
    """Trains what is not complete yet; the folders that failed, with why. The others go on.

    Raises ValueError when the warm start fails, TryAgainError when another comparison works in the
    folder.
    """
    comparison.folder.mkdir(parents=True, exist_ok=True)
    failures: dict[Path, str] = {}
    with _alone(comparison.folder) as handle:
        if (warm := comparison.warm_start) is not None:
            log = comparison.folder / "warm_start.log"
            if failure := _train(warm, comparison.launcher, log, "warm start", handle):
                path = comparison.config.compare.warm_start
                raise ValueError(f"compare.warm_start: {path} failed: {failure}")
        for place, run in enumerate(comparison.runs, start=1):
            label = f"[{place}/{len(comparison.runs)}] {run.algorithm} seed {run.seed}"
            log = comparison.folder / f"{run.folder.name}.log"
            if failure := _train(run, comparison.launcher, log, label, handle):
                failures[run.folder] = failure
    return failures


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """A lock that its runs hold too: one that outlives a killed comparison still writes there."""
    try:
        held = lock.take(folder / ".lock")
    except lock.HeldError as holder:
        raise TryAgainError(
            f"{folder}: the comparison of {holder}, or a run of it, works there; wait for its end"
        ) from None
    with held:
        yield held.fileno()


def _train(run: Run, launcher: tuple[str, ...], log: Path, label: str, handle: int) -> str | None:
    """Trains the run to its end; a sentence if it did not get there."""
    if run.is_complete:
        print(f"{label}: complete already in {run.folder}{_outcome(run)}", flush=True)
        return None
    # The config as it was checked: the user's file may change while other runs train.
    composed = log.with_suffix(".yaml")
    composed.write_text(to_yaml(run.config), encoding="utf-8")
    arguments, how = [str(composed)], "starts"
    if run.has_checkpoint:
        arguments, how = ["--resume", str(run.folder)], "continues from its checkpoint"
    elif (run.folder / CONFIG_FILE).exists():
        shutil.rmtree(run.folder)
        how = "starts anew, there was no checkpoint"
    print(f"{label}: {how}", flush=True)
    command = [*launcher, sys.executable, "-m", "megasd.cli", "train", *arguments]
    began = time.monotonic()
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if launcher else _environment(),
            pass_fds=(handle,),
        ) as process,
    ):
        try:
            _wait(process, run, label)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0 or not run.is_complete:
        failure = f"exit code {process.returncode}, {_last_words(log)} (all of it: {log})"
        print(f"{label}: failed: {failure}", flush=True)
        return failure
    print(f"{label}: done in {time.monotonic() - began:.0f} s{_outcome(run)}", flush=True)
    return None


def _wait(process: subprocess.Popen[bytes], run: Run, label: str) -> None:
    while True:
        try:
            process.wait(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if sys.stdout.isatty():
                done = min(len(read_rows(run.folder / METRICS_FILE)), run.config.run.steps)
                print(f"\r{label}: step {done}/{run.config.run.steps} ", end="", flush=True)
    if sys.stdout.isatty():
        print("\r\x1b[K", end="")


def _environment() -> dict[str, str]:
    """A fixed number of threads, as sums round differently with another; compiled code is kept.

    glibc would give freed memory back at once and fault it in again, much of a tiny model's time.
    """
    environment = {
        "OMP_NUM_THREADS": "2",
        "MALLOC_MMAP_THRESHOLD_": "2000000000",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
        "MALLOC_TOP_PAD_": "67108864",
        **os.environ,
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _outcome(run: Run) -> str:
    """Held-out accuracy before and after, where it is measured."""
    accuracies = [
        row["evaluation/accuracy"]
        for row in read_rows(run.folder / METRICS_FILE)
        if row.get("evaluation/accuracy") is not None
    ]
    return f", accuracy {accuracies[0]:.3f} -> {accuracies[-1]:.3f}" if accuracies else ""


def _last_words(log: Path) -> str:
    """The error that the run printed, else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()] or ["without a word"]
    said = [line for line in lines if line.startswith("megasd: error: ")]
    return (said or lines)[-1]
