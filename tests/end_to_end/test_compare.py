"""`megasd compare` on a model so small that a run takes seconds."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megasd.metrics.records import METRICS_FILE, read_rows
from tests.end_to_end import workspace

RUNS = ["grpo-seed0", "grpo-seed1", "rlsd-seed0", "rlsd-seed1"]


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        workspace.command("compare", *arguments), capture_output=True, text=True, check=False
    )


def interrupt_in(run: Path, *arguments: str | Path) -> None:
    """Starts a comparison and kills it, with the run that it waits for, in mid-training."""
    process = subprocess.Popen(
        workspace.command("compare", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(read_rows(run / METRICS_FILE)) < 3:
        assert process.poll() is None, "the comparison was over before it could be killed"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_an_interrupted_comparison_continues_and_equals_one_that_was_not(tmp_path: Path) -> None:
    """Two algorithms on two seeds after a warm start: killed, finished, asked for again."""
    folder = workspace.make(tmp_path)
    config = workspace.config(folder, "tried", steps=4)
    warm = workspace.config(folder, "warm", steps=1)
    asked = [config, "--algorithms", "grpo,rlsd", "--seeds", "2", f"compare.warm_start={warm}"]
    results = folder / "tried-compare"
    interrupt_in(results / "grpo-seed1", *asked)
    done = compare(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warm start: complete already" in done.stdout
    assert "[1/4] grpo seed 0: complete already" in done.stdout
    assert "[2/4] grpo seed 1: continues from its checkpoint" in done.stdout
    assert "[3/4] rlsd seed 0: starts" in done.stdout

    record = json.loads((results / "compare.json").read_text())
    grpo, rlsd = record["algorithms"]
    assert (grpo["name"], rlsd["name"], record["seeds"]) == ("grpo", "rlsd", [0, 1])
    assert rlsd["difference"]["against"] == "grpo"
    assert (results / "compare.md").read_text() in done.stdout
    assert (results / "compare.png").stat().st_size > 10_000
    rows = {name: workspace.untimed_rows(results / name) for name in RUNS}
    # All start from the warm start; a seed's prompts and evaluation are the same for all methods.
    for seed in (0, 1):
        first, other = (rows[f"{name}-seed{seed}"][0] for name in ("grpo", "rlsd"))
        for metric in ("evaluation/accuracy", "rollout/response_length", "reward/mean"):
            assert first[metric] == other[metric]
    # The killed run is, to the bit, what `megasd train` makes of the same values.
    alone = workspace.train(
        config, "algorithm.name=grpo", "run.seed=1", f"model.path={folder}/warm/hf"
    )
    assert alone.returncode == 0, alone.stderr
    assert workspace.untimed_rows(folder / "tried") == rows["grpo-seed1"]

    before = (results / "compare.json").read_bytes()
    again = compare(*asked)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("complete already") == 5
    assert (results / "compare.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path)
    config = workspace.config(folder, "tried", steps=2)
    results = folder / "tried-compare"
    # A file where the run will want to write: only the run itself can find that out.
    (results / "grpo-seed0").mkdir(parents=True)
    (results / "grpo-seed0" / "checkpoints").write_text("")
    done = compare(config, "--algorithms", "grpo,rlsd", "--seeds", "1")
    assert done.returncode == 2
    assert "[1/2] grpo seed 0: failed" in done.stdout
    assert "[2/2] rlsd seed 0: done" in done.stdout
    assert f"megasd: error: {results}/grpo-seed0: exit code" in done.stderr
    grpo, rlsd = json.loads((results / "compare.json").read_text())["algorithms"]
    assert list(grpo["failures"]) == ["0"]
    assert grpo["accuracy"]["mean"] is None
    assert rlsd["accuracy"]["mean"] is not None
    assert rlsd["difference"] is None, "there is nothing to compare it with"
    assert "- grpo seed 0: exit code" in (results / "compare.md").read_text()
