"""A whole run with vLLM, beside the trainer or on a server."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megasd.metrics.records import METRICS_FILE, read_rows
from tests.end_to_end import workspace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]
ENGINE = ("rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.25", "rollout.sync.bucket_mib=1")
BESIDE = (*ENGINE, "rollout.vllm.park_trainer=true")


def test_a_run_samples_with_vllm_on_a_server(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path, head_dim=32)
    config, run = workspace.config(folder, "run", steps=3), folder / "run"
    where = ("--listen", "127.0.0.1:0", "--folder", str(run / "engines"), "--name", "engine0")
    agent = subprocess.Popen([sys.executable, "-m", "megasd.rollout.vllm.host", *where])
    try:
        server = (*ENGINE, "rollout.vllm.placement=server", "parallel.tensor=2")
        done = workspace.train(config, *server, ranks=2)
    finally:
        agent.terminate()
        agent.wait(30)
    assert done.returncode == 0, done.stderr
    check(run)


def test_a_run_samples_with_vllm_beside_the_trainer(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path, head_dim=32)
    config, run = workspace.config(folder, "run", steps=3), folder / "run"
    done = workspace.train(config, *BESIDE)
    assert done.returncode == 0, done.stderr
    check(run)


def check(run: Path) -> None:
    *steps, last = read_rows(run / METRICS_FILE)
    assert [row["step"] for row in steps] == [0, 1, 2]
    for row in steps:
        assert row["engine/probe_gap"] < 1e-4
        assert row["engine/restarts"] == 0
        assert row["engine/tokens_per_second"] > 0
        assert row["mismatch/abs_mean"] < 1e-4
    assert last["evaluation/responses"] == 10
