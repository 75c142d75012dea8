"""A run is stopped in each of its phases, goes on, and is the run that nobody stopped."""

import subprocess
from pathlib import Path

import pytest

from megasd.metrics.records import METRICS_FILE
from megasd.testing.forked import Forked, complete
from tests.end_to_end import workspace
from tests.end_to_end.stops import run_several

STEPS = 4
STOPS = [  # the phase, for which time in that process, and how many steps are done by then
    ("sync", 1, 0),
    ("evaluation", 1, 0),
    ("reward", 2, 1),
    ("rollout", 1, 1),
    ("score", 1, 1),
    ("update", 1, 2),
    ("checkpoint", 1, 3),
    ("rollout", 1, 3),
    ("evaluation", 1, 4),
]
ROOT = Path(__file__).parents[2]


def start(
    *starts: tuple[list[str], str, int], directory: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return complete([Forked(run_several, starts, directory=directory)])


def exit_codes(done: subprocess.CompletedProcess[str]) -> list[int]:
    """Of the runs in that process, which none of them may have left with a traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line.rpartition("ended with ") for line in done.stdout.splitlines()]
    return [int(code) for _, found, code in lines if found]


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return [line.removeprefix("megasd: ") for line in lines if line.startswith("megasd: ")]


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_phase_is_to_the_bit_the_run_that_was_not(
    tmp_path: Path,
) -> None:
    folder = workspace.make(tmp_path)
    whole, run = folder / "whole", folder / "stopped"
    config = [
        str(workspace.config(folder, name, steps=STEPS, every=3)) for name in ("whole", "stopped")
    ]
    for path in map(Path, config):  # what a run names stays found from elsewhere
        path.write_text(path.read_text().replace(str(folder), "."))
    resume, remedy = ["--resume", str(run)], f"go on with `megasd train --resume {run}`"

    done = start((config[1:], "build", 1), directory=folder)
    assert done.returncode == 130, done.stderr
    assert said(done) == [f"ended by SIGINT: {remedy}"]

    starts = [config[1:], *[resume] * (len(STOPS) - 1)]  # as if there had been no start before
    stops = [(start, *stop[:2]) for start, stop in zip(starts, STOPS, strict=True)]
    done = start((config[:1], "", 0), *stops, (resume, "export", 1), directory=folder)
    assert exit_codes(done) == [0, *[85] * len(STOPS)], done.stdout + done.stderr
    assert done.returncode == 85, "there is nothing to save during the export: it ended at once"
    how = [f"saved after step {step} of {STEPS}" for _, _, step in STOPS]
    how[:2] = ["before its first step, with nothing to save"] * 2
    stopped = [sentence for sentence in said(done) if sentence.startswith("stopped by")]
    assert stopped == [f"stopped by SIGTERM, {one}; {remedy}" for one in how]
    assert said(done)[-1] == f"ended by SIGTERM: {remedy}"
    assert workspace.untimed_rows(run) == workspace.untimed_rows(whole)
    assert not (run / "hf").exists()

    rows = (run / METRICS_FILE).stat()
    done = start(
        (resume, "owned", 0), (resume, "", 0), (resume, "", 0), ([*resume, "run.steps=3"], "", 0)
    )
    assert exit_codes(done) == [1, 0, 0, 2], done.stdout + done.stderr
    finished, already, owned, fewer = said(done)
    assert owned.startswith(f"error: {run} is being run by process ")
    assert finished.startswith(f"{run} is done, {STEPS} steps; its model is in {run / 'hf'}; ")
    assert already.startswith(f"{run} is done already, {STEPS} steps; its model is in ")
    assert fewer.startswith(f"error: run.steps: {run} has done {STEPS} steps already; ")
    assert (run / METRICS_FILE).stat() == rows, "its last evaluation was not made again"
    model = "hf/model.safetensors"
    assert (run / model).read_bytes() == (whole / model).read_bytes()
