"""`megasd compare` on a model so small that a run takes seconds."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasd.compare import execute
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.testing.forked import Forked, complete
from tests.end_to_end import workspace

RUNS = ["grpo-seed0", "grpo-seed1", "rlsd-seed0", "rlsd-seed1"]


class ForkedRun:
    """A run as `compare` starts it, forked from it: what both import is there already."""

    def __init__(self, command: Sequence[str], *, stdout: Any, env: Any, **_: Any) -> None:
        arguments = command[command.index("megasd.cli") + 1 :]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(env)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            code = 1
            try:
                code = workspace.run_megasd(*arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def __enter__(self) -> "ForkedRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self, timeout: float = math.inf) -> int:
        began = time.monotonic()
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > began + timeout:
                raise subprocess.TimeoutExpired("a run", timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def with_forked_runs(*arguments: str) -> int:
    module: Any = execute
    module.subprocess = SimpleNamespace(
        Popen=ForkedRun,
        DEVNULL=subprocess.DEVNULL,
        STDOUT=subprocess.STDOUT,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    return workspace.run_megasd("compare", *arguments)


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return complete([Forked(with_forked_runs, *map(str, arguments))])


def interrupt_in(run: Path, *arguments: str | Path) -> None:
    """Starts a comparison and kills it, with the run that it waits for, in mid-training."""
    process = Forked(with_forked_runs, *map(str, arguments))
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
    asked = workspace.command("compare", config, "--algorithms", "grpo,rlsd", "--seeds", "1")
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
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
