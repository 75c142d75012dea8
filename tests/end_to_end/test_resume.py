"""Killed at any moment and resumed: the run that was never killed, to the bit."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megasd.metrics.records import METRICS_FILE, read_rows
from tests.end_to_end import workspace

STEPS = 16
KILLS = 5


def run_until(arguments: list[str | Path], rows: int, run: Path, delay: float) -> bool:
    """Start, wait for `rows` rows of metrics and `delay` seconds, kill -9; False: it had ended."""
    process = subprocess.Popen(
        workspace.command("train", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and len(read_rows(run / METRICS_FILE)) < rows:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
    time.sleep(delay)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert alive or process.returncode == 0, errors.decode()
    return alive


@pytest.mark.slow
def test_five_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path)
    done = workspace.train(workspace.config(folder, "whole", steps=STEPS))
    assert done.returncode == 0, done.stderr

    draw = random.Random(0)
    moments = sorted(draw.sample(range(1, STEPS), KILLS))
    killed = folder / "killed"
    arguments: list[str | Path] = [workspace.config(folder, "killed", steps=STEPS)]
    kills = 0
    for rows in moments:
        # The delay spreads the kills over rollout, update and the writing of a checkpoint.
        kills += run_until(arguments, rows, killed, delay=draw.uniform(0.0, 0.4))
        arguments = ["--resume", killed]
    assert kills == KILLS, "the run was over before it could be killed"
    done = workspace.train("--resume", killed)
    assert done.returncode == 0, done.stderr

    assert workspace.untimed_rows(killed) == workspace.untimed_rows(folder / "whole")
    assert [row["step"] for row in workspace.untimed_rows(killed)] == [*range(STEPS), STEPS]
    for name in ("hf/model.safetensors", "hf/config.json"):
        assert (killed / name).read_bytes() == (folder / "whole" / name).read_bytes()
    kept = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert kept == [f"step_{STEPS - 2:06d}", f"step_{STEPS:06d}"], "the newest two, no debris"


@pytest.mark.slow
def test_a_run_of_four_ranks_resumes_and_exports_what_transformers_loads(tmp_path: Path) -> None:
    """TP2 x PP2 under torchrun: the metrics of a run cut in two are those of the whole one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = workspace.make(tmp_path)
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    whole = workspace.config(folder, "whole", steps=4, every=2)
    done = workspace.train(whole, *layout, "optimizer.schedule=constant", ranks=4)
    assert done.returncode == 0, done.stderr

    halves = workspace.config(folder, "halves", steps=4, every=2)
    first = [halves, *layout, "optimizer.schedule=constant", "run.steps=2"]
    done = workspace.train(*first, ranks=4)
    assert done.returncode == 0, done.stderr
    done = workspace.train("--resume", folder / "halves", "run.steps=4", ranks=4)
    assert done.returncode == 0, done.stderr

    assert workspace.untimed_rows(folder / "halves") == workspace.untimed_rows(folder / "whole")
    model = AutoModelForCausalLM.from_pretrained(folder / "whole" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "whole" / "hf")
    assert model.config.vocab_size == len(tokenizer)
    exported = folder / "exported"
    done = subprocess.run(
        workspace.command("export", folder / "whole", "--to", exported),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = (folder / "whole" / "hf" / "model.safetensors").read_bytes()
    assert (exported / "model.safetensors").read_bytes() == ours
