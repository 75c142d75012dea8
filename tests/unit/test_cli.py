"""The command line: what it prints, what it hands on, and how it exits."""

import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import megasd.data.sources
from megasd import cli
from megasd.algorithms import ALGORITHMS
from megasd.cli import main
from megasd.configuration.load import load_config, to_yaml, with_absolute_paths
from megasd.process import interrupt
from megasd.weights import conversion
from tests.unit.workspace import make_workspace, write


@pytest.fixture(autouse=True)
def _inside_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_workspace(tmp_path))
    monkeypatch.setattr(interrupt, "listen", lambda: None)  # it would outlive the test
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the command line hands to the run, instead of running it."""
    calls: list[tuple[Any, ...]] = []
    run: Any = types.ModuleType("megasd.run")
    run.start_training = lambda config, *, resume: calls.append((config, resume)) or True
    monkeypatch.setitem(sys.modules, "megasd.run", run)
    monkeypatch.setattr(conversion, "megatron_to_hf", lambda folder, to: calls.append((folder, to)))
    return calls


@pytest.fixture
def run_folder() -> Path:
    """A run of config.yaml, as far as the command line looks."""
    folder = Path("runs/tried")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config("config.yaml")))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    return folder


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("megasd: error: ") for line in lines)
    return [line.removeprefix("megasd: error: ") for line in lines]


def test_a_run_that_stopped_because_it_was_asked_to_exits_with_85(
    started: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = sys.modules["megasd.run"]
    monkeypatch.setattr(run, "start_training", lambda config, *, resume: False)
    assert main(["train", "config.yaml"]) == 85


def test_a_dry_run_prints_the_resolved_config_and_the_plan(
    capsys: pytest.CaptureFixture[str], started: list
) -> None:
    arguments = ["config.yaml", "run.steps=3", "--dry-run", "parallel.tensor=2", "--world-size=4"]
    assert main(["train", *arguments]) == 0
    resolved, _, plan = capsys.readouterr().out.partition("\nranks:")
    write("resolved.yaml", resolved)
    assert load_config("resolved.yaml") == load_config(
        "config.yaml", ["run.steps=3", "parallel.tensor=2"]
    )
    assert "4 = 2 data x 1 pipeline x 2 tensor" in plan
    assert "8 prompts x 4 = 32 responses sampled, mini-batches of 32" in plan
    assert "at most 6,400 per step, 200 per sequence, in a context of 512" in plan
    assert "snapshot weights read the answer" in plan
    *_, header, first, second, _, _ = plan.splitlines()
    assert " ".join(header.split()) == (
        "rank dp pp tp layers vocabulary heads / kv prompts parameters"
    )
    assert first.split()[:-1] == ["0", "0", "0", "0", "0-3", "0-17", "2", "/", "1", "0-3"]
    assert second.split()[:-1] == ["1", "0", "0", "1", "0-3", "18-35", "2", "/", "1", "-"]
    assert started == []


def test_a_large_world_is_planned_by_the_first_ranks_of_each_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--world-size=64", "parallel.pipeline=4", "parallel.tensor=2"]
    assert main(["train", "--dry-run", "config.yaml", *arguments]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[-8:]] == ["0", "1", "16", "17", "32", "33", "48", "49"]
    assert last == "... and 56 more ranks"


def test_a_dry_run_of_a_config_that_has_run_says_so_and_succeeds(
    capsys: pytest.CaptureFixture[str], run_folder: Path
) -> None:
    assert main(["train", "--dry-run", "config.yaml"]) == 0
    assert "megasd: note: run.name: runs/tried holds a run already" in capsys.readouterr().err
    assert main(["train", "config.yaml"]) == 2


def test_bad_input_ends_with_one_line_per_fault_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "megasd.cli", "train", "config.yaml"]
    done = subprocess.run(
        [*command, "run.steps=x", "parallel.tensor=3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(": ")[:4] for line in done.stderr.splitlines()] == [
        ["megasd", "error", "command line", "run.steps"],
        *[["megasd", "error", "command line", "parallel.tensor"]] * 3,  # ranks, heads, kv heads
    ]


def test_only_the_first_rank_prints_what_every_rank_finds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "config.yaml", "run.steps=x"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_the_launcher_tells_the_world_size(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "3")
    assert main(["train", "config.yaml"]) == 2
    (error,) = error_lines(capsys)
    assert "3 data-parallel replicas" in error
    monkeypatch.setenv(name, "three")
    assert main(["train", "config.yaml"]) == 2
    assert error_lines(capsys) == [
        f"environment: {name}=three: not a number of processes; unset it"
    ]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "command line: no config file; name one, or --resume RUN_FOLDER"),
        (["run.steps=3"], "command line: no config file"),
        (["config.yaml", "run.steps"], "command line: run.steps: not an override"),
        (["config.yaml", "--world-size=2"], "--world-size 2: plans a --dry-run"),
        (["config.yaml", "--dry-run", "--world-size=0"], "--world-size 0: plans a --dry-run"),
        (["--resume", "runs"], "runs: not a run folder, it holds no config.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    (error,) = error_lines(capsys)
    assert fragment in error


def test_an_unknown_option_ends_with_the_usage_and_exit_code_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "config.yaml", "--dryrun"])
    assert stopped.value.code == 2


def test_training_starts_with_the_resolved_config(started: list) -> None:
    assert main(["train", "config.yaml", "optimizer.lr=1e-3"]) == 0
    assert started == [(load_config("config.yaml", ["optimizer.lr=1e-3"]), False)]


def test_a_resumed_run_keeps_its_config_but_for_what_may_change(
    started: list, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another place too: the run folder may have moved, and CONFIG may say the new values."""
    moved = run_folder.rename("elsewhere")
    changes = ["run.steps=20", "metrics.console=false", "parallel.timeout_seconds=60"]
    assert main(["train", "--resume", str(moved), *changes]) == 0
    assert main(["train", "config.yaml", "--resume", str(moved), "run.steps=20"]) == 0
    for (config, resume), console in zip(started, (False, True), strict=True):
        assert resume
        assert (config.run.directory, config.run.name) == (str(Path.cwd()), "elsewhere")
        assert (config.run.steps, config.metrics.console) == (20, console)
        assert config.optimizer == load_config("config.yaml").optimizer


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["--resume", "runs/tried", "optimizer.lr=1", "run.steps=20"], "command line"),
        (["other.yaml", "--resume", "runs/tried", "run.steps=20"], "other.yaml"),
    ],
)
def test_a_run_is_not_resumed_with_another_config(
    arguments: list[str],
    source: str,
    started: list,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("other.yaml", "extends: config.yaml\noptimizer: {lr: 1}\n")
    assert main(["train", *arguments]) == 2
    (error,) = error_lines(capsys)
    assert error.startswith(f"{source}: optimizer.lr: ")
    assert "start a new run" in error
    assert started == []


def test_what_a_run_names_stays_its_own_from_another_working_directory(
    started: list, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, config = Path.cwd(), with_absolute_paths(load_config("config.yaml"))
    (run_folder / "config.yaml").write_text(to_yaml(config))
    assert main(["train", "config.yaml", "--resume", "runs/tried"]) == 0, "the same, relative"
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(here / run_folder)]) == 0
    paths = started[1][0]
    assert paths.model.path == str(here / "model")
    assert paths.data.files == [str(here / "train.jsonl")]
    assert paths.evaluation.files == [str(here / "held_out.jsonl")]


@pytest.mark.parametrize(("code", "number"), [(1, errno.ESTALE), (1, errno.EIO), (2, errno.EACCES)])
def test_a_file_server_that_is_away_is_trouble_that_may_pass(
    code: int,
    number: int,
    started: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_text", fail)
    assert main(["train", "config.yaml"]) == code
    (error,) = error_lines(capsys)
    assert error.startswith("config.yaml: cannot be read")
    assert started == []


def test_ctrl_c_ends_every_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "megatron_to_hf", press)
    monkeypatch.setattr(cli, "existing_run", Path)
    assert main(["export", "run", "--to", "there"]) == 130
    assert capsys.readouterr().err == "megasd: interrupted\n"


def test_a_fault_found_while_running_is_a_sentence_but_a_bug_keeps_its_traceback(
    started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Any = sys.modules["megasd.run"]

    def refuse(config: Any, *, resume: bool) -> None:
        megasd.data.sources.file_rows(["gone.jsonl"]).__next__()

    run.start_training = refuse
    assert main(["train", "config.yaml"]) == 2
    assert error_lines(capsys) == [
        "data.files: gone.jsonl does not exist; paths start at the working directory."
    ]
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "config.yaml"]) == 2
    assert error_lines(capsys)[0].startswith("rank 1: data.files: gone.jsonl")
    run.start_training = lambda config, *, resume: int("a bug")
    with pytest.raises(ValueError, match="invalid literal"):
        main(["train", "config.yaml"])


def test_algorithms_are_listed_with_papers_needs_and_the_sources_of_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["algorithms"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert main(["algorithms", "--json"]) == 0
    listed = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert [line.split()[0] for line in lines] == list(listed) == list(ALGORITHMS)
    for method in listed.values():
        assert method.keys() == {"name", "paper", "needs", "defaults"}
        assert all(default["source"] for default in method["defaults"].values()), method["name"]
    rlsd, sdpo_code = listed["rlsd"], listed["sdpo_code"]
    assert rlsd["paper"] == "arXiv:2604.03128"
    assert rlsd["needs"]["contexts"] == ["answer"]
    assert rlsd["needs"]["passes"] == ["student before the update", "teacher as teacher"]
    assert rlsd["defaults"]["algorithm.mix"] == {"value": 0.5, "source": "paper (section 5.1)"}
    assert rlsd["defaults"]["teacher.every"]["value"] == 10
    assert sdpo_code["defaults"]["teacher.decay"] == {"value": 0.99, "source": "preset sdpo_code"}
    assert sdpo_code["defaults"]["algorithm.divergence"]["value"]["rest"] == "tail"
    assert sdpo_code["needs"]["bytes_per_token"]["reading_rank"] == 8 * 20


def test_an_export_goes_to_a_new_folder(
    started: list, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "runs/tried", "--to", "exported"]) == 0
    assert started == [(run_folder.resolve(), Path("exported"))]
    assert main(["export", "runs/tried", "--to", "model"]) == 2
    assert error_lines(capsys) == ["--to model: exists and is not an empty folder; choose another"]
