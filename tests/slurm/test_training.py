"""Training as Slurm jobs: what the cluster does to a run leaves no trace in its metrics."""

import contextlib
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from megasd.cli import main
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.testing.slurm import VirtualSlurm
from tests.end_to_end import workspace

pytestmark = pytest.mark.slow

STEPS = 10
SITE = """
gpus_per_node: 2
time: "10"
signal_lead_seconds: 60
preflight: false
grace_seconds: 10
"""
# Without evaluations between, the first of which may take an hour.
WATCHED = ["watchdog.factor=2", "watchdog.minimum_seconds=12", "evaluation.every=0"]
LAYOUT = ["parallel.tensor=2", "run.device=cpu", "checkpoint.export_hf=false"]


def submit(name: str, capsys: pytest.CaptureFixture[str], *arguments: str, steps: int) -> str:
    """The id of the job."""
    config = workspace.config(Path.cwd(), name, steps=steps, every=100)
    given = ["--site", "site.yaml", "--env", f"PYTHONPATH={ROOT}", *arguments]
    assert main(["submit", str(config), *LAYOUT, *given]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.strip()


ROOT = Path(__file__).parents[2]  # of the tests' own verifier


def rows(run: Path) -> int:
    return len(read_rows(run / METRICS_FILE)) if (run / METRICS_FILE).exists() else 0


def logs(run: Path) -> str:
    """For the message of a failure."""
    return "\n".join(f"{path}:\n{path.read_text()}" for path in sorted(run.rglob("*.log")))


def process_of(job: str, rank: int) -> int:
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is gone
            is_rank = b"megasd.cli\0train" in (process / "cmdline").read_bytes()
            if is_rank and wanted <= {*(process / "environ").read_bytes().split(b"\0")}:
                return int(process.name)
    raise AssertionError(f"rank {rank} of job {job} does not run")


def test_a_run_that_is_preempted_hangs_and_loses_a_node_equals_one_that_was_left_alone(
    slurm: VirtualSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workspace.make(tmp_path))
    # A rank for each node: where a node has two, see the run below.
    site = SITE.replace("gpus_per_node: 2", "gpus_per_node: 1")
    Path("site.yaml").write_text(site)
    Path("examined.yaml").write_text(site.replace("preflight: false", "preflight: true"))
    whole = submit("whole", capsys, "--nodes=2", "--site=examined.yaml", *WATCHED, steps=STEPS)
    disturbed = submit("disturbed", capsys, "--nodes=2", *WATCHED, steps=STEPS)
    run = tmp_path / "disturbed"

    assert slurm.wait(whole, timeout=300)["JobState"] == "COMPLETED", logs(tmp_path / "whole")
    (examined,) = (tmp_path / "whole" / "logs").glob("*/preflight.log")
    assert "2 ranks on 2 nodes answer" in examined.read_text()
    assert "nothing is wrong" in examined.read_text()
    assert not list((run / "logs").glob("*/preflight.log"))
    slurm.until(lambda: rows(run) >= 2, "two steps", 300)
    slurm.run("scancel", "--signal=USR1", "--batch", disturbed)
    slurm.until(lambda: slurm.job(disturbed)["Restarts"] == "1", "a requeue")
    (checkpoint,) = (run / "checkpoints").iterdir()
    saved = int(checkpoint.name.removeprefix("step_"))
    assert 2 <= saved < STEPS
    slurm.until(lambda: rows(run) > saved, "a step after the first resumption", 300)

    before = (run / METRICS_FILE).stat().st_ino
    os.kill(process_of(disturbed, 1), signal.SIGSTOP)
    slurm.until(lambda: list(run.glob("hangs/*/summary.txt")), "the name of the rank", 60)
    (summary,) = run.glob("hangs/*/summary.txt")
    assert "rank 1 (node " in summary.read_text()
    assert "does not answer" in summary.read_text()
    slurm.until(lambda: slurm.job(disturbed)["Restarts"] == "2", "a requeue")
    assert "a rank hung: no step for " in (run / "logs" / f"{disturbed}.log").read_text()

    # It drops the rows behind the checkpoint, by a rename.
    slurm.until(lambda: (run / METRICS_FILE).stat().st_ino != before, "the next start", 300)
    slurm.until(lambda: rows(run) > saved, "a step after the second resumption", 300)
    nodes = slurm.run("scontrol", "show", "hostnames", slurm.job(disturbed)["NodeList"])
    slurm.fail_node(nodes.splitlines()[0])
    ended = slurm.wait(disturbed, timeout=300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "3"), logs(run)

    assert workspace.untimed_rows(run) == workspace.untimed_rows(tmp_path / "whole")
    assert [row["step"] for row in workspace.untimed_rows(run)] == [*range(STEPS), STEPS]


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")
def test_a_run_samples_with_engines_on_nodes_of_their_own(
    slurm: VirtualSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workspace.make(tmp_path, head_dim=32))
    Path("site.yaml").write_text(SITE)
    engine = ["rollout.engine=vllm", "rollout.vllm.placement=server"]
    engine += ["rollout.vllm.kv_cache_gib=0.25", "evaluation.files=[]"]
    job = submit("served", capsys, *engine, steps=1)
    ended = slurm.wait(job, timeout=300)
    assert (ended["JobState"], ended["NumNodes"]) == ("COMPLETED", "2"), logs(tmp_path / "served")
    (row,) = read_rows(tmp_path / "served" / METRICS_FILE)
    assert row["engine/tokens_per_second"] > 0
