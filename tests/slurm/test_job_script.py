"""What the job script does with signals, exit codes and names; the ranks are played by a script."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megasd.cli import main
from megasd.launch import render
from megasd.testing.slurm import VirtualSlurm
from tests.unit.workspace import make_workspace

pytestmark = pytest.mark.slow

REQUIREMENTS = Path(__file__).parents[2] / "tools" / "nemo_run.txt"
SITE = """
python: {python}
gpus_per_node: 2
time: "10"
max_crashes: 2
signal_lead_seconds: 60
network_gb_per_second: 25
"""


class Workplace:
    """A folder to submit from, whose name needs quoting everywhere."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.run = folder / "runs" / "tried"
        self.record = folder / "record"
        self.record.mkdir()
        self._capsys = capsys
        interpreter = folder / "python"  # no path with spaces in a first line of a script
        stand_in = Path(__file__).with_name("scripted_python.py")
        interpreter.write_text(f'#!/bin/bash\nexec {sys.executable} -S "{stand_in}" "$@"\n')
        interpreter.chmod(0o755)
        Path("site.yaml").write_text(SITE.format(python=json.dumps(str(interpreter))))

    def submit(self, behaviour: str, *arguments: str, preflight: str = "0") -> list[str]:
        """The ids of the jobs."""
        given = ["--site", "site.yaml", "--env", f"RECORD={self.record}"]
        given += ["--env", f"BEHAVIOUR={behaviour}", "--env", f"PREFLIGHT={preflight}", *arguments]
        assert main(["submit", "config.yaml", *given]) == 0, self._capsys.readouterr().err
        return self._capsys.readouterr().out.split()

    def notes(self, job: str, attempt: int, who: str = "rank") -> list[dict[str, Any]]:
        files = sorted(self.record.glob(f"{job}-{attempt}-{who}-*.json"))
        return [json.loads(file.read_text()) for file in files]

    def log(self, job: str) -> str:
        return (self.run / "logs" / f"{job}.log").read_text()


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Workplace:
    folder = tmp_path / 'it\'s a "place" of 5% $HOME'
    folder.mkdir()
    monkeypatch.chdir(make_workspace(folder))
    return Workplace(folder, capsys)


def test_arguments_and_environment_arrive_as_they_were_given(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    template = "a \"quoted\" and 'single' $HOME `ls` \\ {context}"
    value = 'it\'s "two"  spaces, $PATH, 100%, \\back\nand a line'
    (job,) = place.submit(
        "0", "--nodes", "2", f"context.template={json.dumps(template)}", "--env", f"NOTE={value}"
    )
    assert slurm.wait(job)["JobState"] == "COMPLETED", place.log(job)
    notes = place.notes(job, 0)
    assert len(notes) == 4
    assert [note["environment"]["RANK"] for note in notes] == list("0123")
    assert [note["environment"]["LOCAL_RANK"] for note in notes] == list("0101")
    assert {note["environment"]["WORLD_SIZE"] for note in notes} == {"4"}
    assert {note["environment"]["CUDA_VISIBLE_DEVICES"] for note in notes} == {"0,1"}
    assert {note["environment"]["MASTER_ADDR"] for note in notes} == {"127.0.0.1"}
    assert {note["environment"]["NOTE"] for note in notes} == {value}
    config = place.run / "submissions" / "001" / "config.yaml"
    for note in notes:
        assert note["arguments"] == ["-m", "megasd.cli", "train", str(config)]
        assert Path(note["environment"]["PWD"]) == place.folder
    from megasd.configuration.load import load_config

    assert load_config(config).context.template == template
    logs = sorted(path.name for path in (place.run / "logs" / f"{job}-0").iterdir())
    assert logs == ["nodes", "preflight.log", *(f"rank-{rank}.log" for rank in range(4))]
    examined = place.notes(job, 0, "preflight")
    doctor = ["-m", "megasd.cli", "doctor", "--preflight", "--network", "25.0"]
    for note, rank in zip(examined, notes, strict=True):
        assert note["arguments"] == [*doctor, "--folder", str(place.run)]
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            assert note["environment"][name] == rank["environment"][name]
        assert note["environment"]["MASTER_PORT"] != rank["environment"]["MASTER_PORT"]
        assert note["environment"]["MEGASD_NODES"] == "n1,n2"


def test_a_job_whose_nodes_are_wanted_saves_goes_back_to_the_queue_and_resumes(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    (job,) = place.submit("wait 0", "--nodes", "2", "--partition", "all")
    slurm.until(lambda: len(place.notes(job, 0)) == 4, "four ranks")
    slurm.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 1")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), place.log(job)
    assert "saved" in place.log(job)
    for note in place.notes(job, 1):
        assert note["arguments"][-2:] == ["--resume", str(place.run)]


def test_ranks_that_get_term_alone_save_and_the_job_goes_back_to_the_queue(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    """As Slurm sends it at the beginning of a preemption's grace."""
    (job,) = place.submit("wait 0")
    slurm.until(lambda: len(place.notes(job, 0)) == 2, "two ranks")
    slurm.run("scancel", "--signal=TERM", job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), place.log(job)


def test_ranks_that_do_not_save_in_time_are_ended_before_the_limit_and_start_again(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    Path("hasty.yaml").write_text(
        Path("site.yaml").read_text().replace("lead_seconds: 60", "lead_seconds: 4")
    )
    (job,) = place.submit("hang 0", "--site", "hasty.yaml")
    slurm.until(lambda: len(place.notes(job, 0)) == 2, "two ranks")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), place.log(job)
    assert "the ranks did not save in time" in place.log(job)


def test_what_a_user_cancels_stays_cancelled(slurm: VirtualSlurm, place: Workplace) -> None:
    (job,) = place.submit("hang")
    slurm.until(lambda: len(place.notes(job, 0)) == 2, "two ranks")
    slurm.run("scancel", job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), place.log(job)
    slurm.until(lambda: not slurm.run("squeue", "-h"), "the end of the job")
    assert "requeue\n" not in place.log(job)


def test_crashes_are_tried_again_until_two_come_without_a_new_checkpoint(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    with Path("site.yaml").open("a") as site:
        site.write("grace_seconds: 2\n")  # for those that wait for a rank which is gone
    (job,) = place.submit("alone,1 save,watched,86 1 0")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), place.log(job)
    assert "2 crashes without a new checkpoint" in place.log(job)
    # Said when it happened, and not again of the next crash.
    said = [
        line for line in place.log(job).splitlines() if "a rank hung: rank 1 is the first" in line
    ]
    assert len(said) == 1
    assert "attempt 1" in said[0]


def test_nodes_that_a_preflight_finds_wrong_are_named_and_avoided_and_it_counts_as_a_crash(
    slurm: VirtualSlurm, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "PREFLIGHT_SECONDS", 12)
    (job,) = place.submit("0", "--nodes", "2", preflight="wrong hang 0")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), place.log(job)
    assert "WRONG: node n1: GPU 1: 3 uncorrected ECC errors" in place.log(job)
    assert "the preflight did not end in 12 seconds" in place.log(job)
    assert "2 crashes without a new checkpoint" in place.log(job)
    nodes = [
        {n["environment"]["SLURMD_NODENAME"] for n in place.notes(job, i, "preflight")}
        for i in (0, 1)
    ]
    assert nodes == [{"n1", "n2"}, {"n2", "n3"}]
    assert not list(place.record.glob("*-rank-*"))


def test_a_job_whose_nodes_are_wanted_during_the_preflight_leaves_at_once_and_starts_again(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    (job,) = place.submit("0", preflight="hang 0")
    slurm.until(lambda: len(place.notes(job, 0, "preflight")) == 2, "the preflight")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), place.log(job)
    assert place.notes(job, 0) == []
    assert not (place.run / "submissions" / "001" / "crashes").exists()


def test_a_run_that_cannot_use_its_input_is_not_tried_again(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    (job,) = place.submit("2")
    ended = slurm.wait(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), place.log(job)


def test_a_chain_goes_on_link_by_link_and_stops_when_the_run_is_done(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    first, second, third = place.submit("wait", "--chain", "3")
    slurm.until(lambda: len(place.notes(first, 0)) == 2, "two ranks")
    assert slurm.job(second)["Dependency"] == "singleton(unfulfilled)"
    slurm.run("scancel", "--signal=USR1", "--batch", first)
    assert slurm.wait(first)["ExitCode"] == "85:0", place.log(first)
    slurm.until(lambda: len(place.notes(second, 0)) == 2, "the second link")
    assert place.notes(second, 0)[0]["arguments"][-2:] == ["--resume", str(place.run)]
    (place.run / "submissions" / "001" / "done").touch()
    slurm.run("scancel", "--signal=USR1", "--batch", second)
    assert slurm.wait(third)["JobState"] == "COMPLETED", place.log(third)
    assert place.notes(third, 0) == []


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_engines_get_nodes_of_their_own_and_end_with_the_job(
    slurm: VirtualSlurm, place: Workplace
) -> None:
    server = ["rollout.engine=vllm", "rollout.vllm.placement=server", "rollout.vllm.engines=2"]
    (job,) = place.submit("wait 0", *server)
    slurm.until(lambda: len(place.notes(job, 0, "engine")) == 2, "two engines")
    slurm.until(lambda: len(place.notes(job, 0)) == 2, "two ranks")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    assert slurm.wait(job)["JobState"] == "COMPLETED", place.log(job)
    engines = place.notes(job, 0, "engine")
    folder = str(place.run / "engines")
    for number, engine in enumerate(engines):
        agent = ["-m", "megasd.rollout.vllm.host", "--listen", ":0", "--folder", folder]
        assert engine["arguments"] == [*agent, "--name", f"engine{number}"]
    assert [engine["environment"]["CUDA_VISIBLE_DEVICES"] for engine in engines] == ["0", "1"]
    assert {engine["environment"]["SLURMD_NODENAME"] for engine in engines} == {"n2"}
    assert {note["environment"]["SLURMD_NODENAME"] for note in place.notes(job, 0)} == {"n1"}


def test_what_no_partition_can_run_is_refused_in_the_words_of_slurm(
    slurm: VirtualSlurm, place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "config.yaml", "--site", "site.yaml", "--nodes", "4"]) == 2
    assert "Requested node configuration is not available" in capsys.readouterr().err
    assert slurm.run("squeue", "-h") == ""
    assert not place.run.exists()


@pytest.fixture
def nemo_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes that the test starts; installed for this test alone where it is not there."""
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "catalogue"))
    if find_spec("nemo_run") is not None:
        return
    how = ["--quiet", "--no-compile", "--no-deps", "--only-binary=:all:"]
    install = [sys.executable, "-m", "pip", "install", *how, "--target", str(tmp_path / "packages")]
    done = subprocess.run(
        [*install, "--requirement", str(REQUIREMENTS)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"NeMo-Run cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


@pytest.mark.usefixtures("nemo_run")
def test_by_way_of_nemo_run_it_is_the_same_job(slurm: VirtualSlurm, place: Workplace) -> None:
    value = 'it\'s "two"  spaces, $PATH, 100%, \\back\nand a line'
    given = ["--nodes", "2", "--env", f"NOTE={value}"]
    # In a process of its own: NeMo-Run looks for its catalogue when it is imported.
    site = ["--site", "site.yaml", "--env", f"RECORD={place.record}"]
    site += ["--env", "BEHAVIOUR=wait 0", "--env", "PREFLIGHT=0"]
    command = [sys.executable, "-m", "megasd.cli", "submit", "config.yaml", *site, *given]
    done = subprocess.run([*command, "--via=nemo-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = done.stdout.strip()

    slurm.until(lambda: len(place.notes(theirs, 0)) == 4, "four ranks")
    assert {note["environment"]["NOTE"] for note in place.notes(theirs, 0)} == {value}
    config = str(place.run / "submissions" / "001" / "config.yaml")
    assert place.notes(theirs, 0)[0]["arguments"] == ["-m", "megasd.cli", "train", config]
    (ours,) = place.submit("0", *given)
    assert slurm.job(ours)["Dependency"] == "singleton(unfulfilled)"
    for key in ("JobName", "Partition", "TimeLimit", "Requeue", "TresPerNode", "NtasksPerN:B:S:C"):
        assert slurm.job(theirs)[key] == slurm.job(ours)[key]
    slurm.run("scancel", ours)
    slurm.run("scancel", "--signal=USR1", "--batch", theirs)
    ended = slurm.wait(theirs)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), place.log(theirs)
