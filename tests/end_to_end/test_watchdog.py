"""A run in which nothing happens any more ends, says who is waited for, and can go on."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megasd.loop.watchdog import EXIT_CODE, SUMMARY_FILE
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.testing.forked import Forked
from tests.end_to_end import workspace

# Ranks that hang from the start; the looks of rank 0 come nearly a tick after those of the others.
HANG = """
    import os, sys, time
    from pathlib import Path
    import torch.distributed as dist
    from megasd.configuration.load import WatchdogConfig
    from megasd.metrics.phases import Phases
    from megasd.loop.watchdog import Watchdog

    dist.init_process_group("gloo")
    config = WatchdogConfig(factor=1.0, minimum_seconds=0.1, slow_seconds=0.1)
    watchdog = Watchdog(config, Path(sys.argv[1]), Phases())
    watchdog._tick = float(sys.argv[2])
    if os.environ["RANK"] == "0":
        time.sleep(0.9 * watchdog._tick)
    if "stuck" in sys.argv:  # to open it for writing waits for a reader
        watchdog._folder.mkdir(parents=True)
        os.mkfifo(watchdog._folder / "rank-0.stacks")
    with watchdog:
        time.sleep(120)
"""
SETTINGS = ("watchdog.factor=3", "watchdog.minimum_seconds=8", "evaluation.every=0")


def start(*arguments: str | Path, ranks: int = 1) -> list[Forked]:
    return workspace.start("train", *arguments, *SETTINGS, ranks=ranks)


def await_rows(process: Forked, run: Path) -> None:
    """Until it has trained a few steps: what they take is usual then."""
    while process.poll() is None and len(read_rows(run / METRICS_FILE)) < 3:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sample_whose_verdict_does_not_come_is_named_and_the_run_can_go_on(
    tmp_path: Path,
) -> None:
    folder = workspace.make(tmp_path)
    path, run = workspace.config(folder, "run", steps=1000, every=0), folder / "run"
    hangs = "tests.end_to_end.verifiers:hangs_on_a_file"
    path.write_text(path.read_text().replace(workspace.VERIFIER, hangs))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    obstacle = folder / "obstacle"
    for row in rows:
        row["metadata"] = {"obstacle": str(obstacle)} if row["answer"] == "8" else {}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (process,) = start(path, "reward.timeout_seconds=900")
    await_rows(process, run)
    obstacle.touch()
    _, errors = process.communicate(timeout=180)
    assert process.returncode == EXIT_CODE, errors
    (summary,) = run.glob(f"hangs/*/{SUMMARY_FILE}")
    said = summary.read_text()
    assert said.startswith("no step for ")
    assert "rank 0 " in said
    assert "is in phase reward at rewards/scorer.py:" in said
    assert "waits for verdicts on " in said
    assert "train.jsonl:5 sample " in said
    assert said.splitlines()[0] in errors
    stacks = (summary.parent / "rank-0.stacks").read_text()
    assert "in _judge_in_workers" in stacks

    obstacle.unlink()
    done = workspace.train("--resume", run, "run.steps=3")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_rows(run / METRICS_FILE)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_rank_that_stops_is_named_within_the_limit(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path)
    # A wait for a checkpoint's files, and the first evaluation between steps, would have an hour.
    path, run = workspace.config(folder, "run", steps=1000, every=0), folder / "run"
    first, second = start(path, "parallel.tensor=2", ranks=2)
    await_rows(first, run)
    os.kill(second.pid, signal.SIGSTOP)
    began = time.monotonic()
    while not (found := list(run.glob(f"hangs/*/{SUMMARY_FILE}"))):
        assert time.monotonic() - began < 60, "nothing was noticed"
        time.sleep(0.1)
    said = found[0].read_text()
    assert ": rank 1 (node " in said
    assert "does not answer" in said
    second.kill()
    first.wait(60)


def hang(run: Path, *how: str, tick: float, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    script = run / "hang.py"
    script.write_text(textwrap.dedent(HANG))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launch, str(script), str(run), str(tick), *how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_under_torchrun_which_ends_all_ranks_with_the_first_there_is_a_summary(
    tmp_path: Path,
) -> None:
    done = hang(tmp_path, tick=2.0, ranks=2)
    (summary,) = tmp_path.glob(f"hangs/*/{SUMMARY_FILE}")
    assert "every rank is at" in summary.read_text()
    assert summary.read_text().splitlines()[0] in done.stderr


@pytest.mark.slow
def test_a_rank_whose_file_system_hangs_ends_all_the_same_and_its_stacks_go_to_stderr(
    tmp_path: Path,
) -> None:
    done = hang(tmp_path, "stuck", tick=0.1)
    assert f"exitcode  : {EXIT_CODE}" in done.stderr
    assert "does not answer; stacks of rank 0:\nTimeout" in done.stderr
    assert 'hang.py", line ' in done.stderr
