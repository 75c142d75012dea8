import contextlib
import io
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from PIL import Image

from megasd.metrics import wandb as wandb_record
from megasd.metrics.config import MetricsConfig
from megasd.metrics.phases import Phases
from megasd.metrics.plot import plot_run
from megasd.metrics.records import Metrics, read_rows
from megasd.metrics.run_folder import create_run_folder, git_state, versions

QUIET = MetricsConfig(console=False, wandb="off")


def metrics(folder: Path, config: MetricsConfig = QUIET, **changes: Any) -> Metrics:
    arguments: dict[str, Any] = {"total_steps": 4, "rank": 0, "first_step": 0, **changes}
    return Metrics(config, folder, run_config={"run": {"name": "test"}}, **arguments)


def on_a_full_disk(code: str, folder: Path) -> str:
    """What `code` prints, in a process whose files cannot grow beyond 1000 bytes."""
    limited = """
        import resource, sys, warnings
        from pathlib import Path
        from megasd.metrics.config import MetricsConfig
        from megasd.metrics.records import Metrics
        from megasd.metrics.run_folder import create_run_folder
        folder = Path(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    """
    program = textwrap.dedent(limited) + textwrap.dedent(code)
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Clock:
    """Time that only passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- phases


def test_a_step_is_split_into_its_phases_and_what_is_left_is_outside_the_model() -> None:
    clock = Clock()
    phases = Phases(clock)
    seconds = {"rollout": 4.0, "reward": 1.0, "score": 2.0, "update": 1.5, "sync": 0.5}
    for phase, duration in seconds.items():
        with phases(phase):  # pyright: ignore[reportArgumentType]
            clock.now += duration
    clock.now += 1.0  # data, bookkeeping
    report = phases.finish_step(num_tokens=500)
    assert report.pop("time/step") == 10.0
    assert report.pop("speed/outside_model") == pytest.approx(1 - 8 / 10)
    assert report.pop("speed/tokens_per_second") == pytest.approx(50)
    assert report == {f"time/{phase}": duration for phase, duration in seconds.items()}


def test_a_phase_adds_up_over_a_step_and_starts_at_zero_in_the_next() -> None:
    clock = Clock()
    phases = Phases(clock)
    for _ in range(3):
        with phases("rollout"):
            clock.now += 1.0
    assert phases.finish_step(1)["time/rollout"] == 3.0
    clock.now += 2.0
    report = phases.finish_step(1)
    assert report["time/step"] == 2.0
    assert "time/rollout" not in report
    assert report["speed/outside_model"] == 1.0


def test_evaluation_slows_no_figure_of_training() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases("evaluation"):
        clock.now += 90.0
    with phases("update"):
        clock.now += 10.0
    report = phases.finish_step(num_tokens=100)
    assert report["time/step"] == 100.0
    assert report["speed/tokens_per_second"] == 10.0
    assert report["speed/outside_model"] == 0.0


def test_a_second_cannot_count_in_two_phases() -> None:
    phases = Phases()
    with phases("update"), pytest.raises(AssertionError, match="sync began inside update"):  # noqa: SIM117
        with phases("sync"):
            pass


# ---- metrics.jsonl


def test_each_step_is_a_line_with_sorted_keys_and_null_for_what_is_not_finite(
    tmp_path: Path,
) -> None:
    with metrics(tmp_path) as records:
        records.log(0, {"update/loss": 0.1 + 0.2, "reward/mean": math.nan, "a": math.inf})
        written = (tmp_path / "metrics.jsonl").read_text()  # flushed: a kill now loses nothing
    assert written == (
        '{"a": null, "reward/mean": null, "step": 0, "update/loss": 0.30000000000000004}\n'
    )


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with metrics(tmp_path, rank=1) as records:
        records.log(0, {"update/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_after_a_resume_the_file_equals_that_of_a_run_that_was_never_killed(tmp_path: Path) -> None:
    def row(step: int) -> dict[str, float]:
        return {"update/loss": 1 / (step + 3)}

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder, last in ((whole, 4), (killed, 3)):
        folder.mkdir()
        with metrics(folder) as records:
            for step in range(last):
                records.log(step, row(step))
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "update/l')  # killed inside a write
    with metrics(killed, first_step=2) as records:
        for step in (2, 3):
            records.log(step, row(step))
    assert (killed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON row"):
        metrics(tmp_path, first_step=1)
    assert path.read_text().count("\n") == 3


def test_rows_of_steps_that_no_checkpoint_knows_stay_until_there_is_another(tmp_path: Path) -> None:
    """A run that is killed before it has any does not lose its last evaluation."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"evaluation/accuracy": 0.5, "step": 2}\n')
    with metrics(tmp_path, first_step=1) as records:
        assert [row["step"] for row in read_rows(path)] == [0, 1, 2]
        records.log(1, {"update/loss": 1.0})
        assert read_rows(path) == [{"step": 0}, {"step": 1, "update/loss": 1.0}]


def test_rows_that_the_disk_has_no_room_for_are_kept_and_written_when_there_is_some(
    tmp_path: Path,
) -> None:
    said = on_a_full_disk(
        """
        config = MetricsConfig(console=False, wandb="off")
        unwritten = []
        records = Metrics(
            config, folder, total_steps=4, rank=0, run_config={}, unwritten=unwritten
        )
        records.log(0, {"update/loss": 0.5})
        with warnings.catch_warnings(record=True) as caught:
            records.log(1, {f"metric/{i}": 0.5 for i in range(100)})
            records.log(2, {"update/loss": 0.25})
        print(*(warning.message for warning in caught))
        print(len(unwritten), (folder / "metrics.jsonl").read_text(), end="")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        records.log(3, {"update/loss": 0.125})
        print(unwritten)
        """,
        tmp_path,
    )
    path = tmp_path / "metrics.jsonl"
    assert said == (
        f"{path} cannot be written (File too large); make room: its rows are kept, in checkpoints "
        'too, and written when that works again\n2 {"step": 0, "update/loss": 0.5}\n[]\n'
    )
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]


def test_rows_that_only_a_checkpoint_holds_are_written_at_a_resume(tmp_path: Path) -> None:
    with metrics(tmp_path) as records:
        for step in (0, 1):
            records.log(step, {"update/loss": float(step)})
    from_checkpoint = ['{"step": 2, "update/loss": 2.0}\n', '{"step": 1, "update/loss": 1.0}\n']
    metrics(tmp_path, first_step=3, unwritten=from_checkpoint)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert from_checkpoint == []


# ---- wandb and console


def test_wandb_is_not_imported_when_off() -> None:
    code = (
        "import sys, megasd.metrics.records; print(sorted({'wandb', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_key_wandb_records_offline_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with metrics(tmp_path, MetricsConfig(console=False)) as records:
        records.log(0, {"update/loss": 1.0})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_with_a_key_and_no_network_wandb_warns_and_records_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(wandb_record, "INIT_SECONDS", 0.5)
    with pytest.warns(UserWarning, match=r"metrics\.wandb: cannot go online \("):
        records = metrics(tmp_path, MetricsConfig())
    with records:
        records.log(0, {"update/loss": 1.0})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert f"wandb: {tmp_path}/wandb/offline-run-" in capsys.readouterr().out


def test_a_wandb_whose_service_is_gone_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with metrics(tmp_path, MetricsConfig(console=False)) as records:
        service = psutil.Process(os.getpid()).children(recursive=True)
        for process in service:
            process.kill()
        psutil.wait_procs(service)
        with pytest.warns(UserWarning, match=r"metrics\.wandb: failed and is left out"):
            records.log(0, {"update/loss": 1.0})
        records.log(1, {"update/loss": 1.0})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
    with contextlib.suppress(ConnectionError):
        wandb.teardown()  # for the tests behind this one


@pytest.mark.parametrize(
    ("key", "config", "environment", "chosen"),
    [
        ("", "auto", "", "offline"),
        ("k", "auto", "", "online"),
        ("k", "auto", "offline", "offline"),
        ("k", "auto", "disabled", "off"),
        ("k", "online", "offline", "online"),
        ("k", "off", "online", "off"),
    ],
)
def test_the_config_chooses_wandbs_mode_and_auto_leaves_it_to_the_environment(
    key: str, config: Any, environment: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_record.chosen_mode(MetricsConfig(wandb=config)) == chosen


def test_a_console_that_nobody_reads_any_more_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(write, "w"), write_through=True))
    with metrics(tmp_path, MetricsConfig(wandb="off")) as records:
        with pytest.warns(UserWarning, match=r"metrics\.console: failed.*BrokenPipeError"):
            records.log(0, {"update/loss": 1.0})
        records.log(1, {"update/loss": 1.0})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_without_a_terminal_there_is_a_plain_line_for_each_step_or_each_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"reward/mean": 0.25, "update/grad_norm": 1.5, "teacher/gap_mean": 3.0}
    held_out = {"accuracy": 0.4, "accuracy_low": 0.35, "accuracy_high": 0.45}
    with metrics(tmp_path, MetricsConfig(wandb="off"), total_steps=1000) as records:
        for step in range(1000):
            records.log(step, values)
        records.log(1000, {f"evaluation/{name}": value for name, value in held_out.items()})
    first, *others, last_step, accuracy = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/1000  reward 0.25  grad norm 1.5  eta 0:")
    assert len(others) < 100
    assert last_step == "step 1000/1000  reward 0.25  grad norm 1.5  eta 0:00:00"
    assert accuracy == "step 1000  held-out accuracy 0.400  95% interval [0.350, 0.450]"


# ---- run folder and plot


def test_a_run_folder_says_what_was_run_and_is_never_written_over(tmp_path: Path) -> None:
    folder = create_run_folder(tmp_path / "run", config="run: {}\n", seed=7, command=["train", "x"])
    assert (folder / "config.yaml").read_text() == "run: {}\n"
    assert json.loads((folder / "run.json").read_text()) == {"seed": 7, "command": ["train", "x"]}
    recorded = json.loads((folder / "versions.json").read_text())
    assert recorded == versions()
    assert recorded["python"] == sys.version.split()[0]
    assert (folder / "git.json").exists()
    create_run_folder(
        folder, config="run: {again: 1}\n", seed=7, command=[]
    )  # nothing was done yet
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"run\.name: .*run already holds a run.*--resume"):
        create_run_folder(folder, config="", seed=0, command=[])
    assert (folder / "config.yaml").read_text() == "run: {again: 1}\n"


def test_a_config_that_cannot_be_written_whole_makes_no_run(tmp_path: Path) -> None:
    said = on_a_full_disk(
        """
        try:
            create_run_folder(folder, config="run: {}\\n" * 200, seed=0, command=[])
        except OSError as error:
            print(error.strerror)
        """,
        tmp_path,
    )
    assert said == "File too large\n"
    assert (tmp_path / "run.json").exists()
    assert not (tmp_path / "config.yaml").exists()
    create_run_folder(tmp_path, config="run: {}\n", seed=0, command=[])
    assert (tmp_path / "config.yaml").read_text() == "run: {}\n"


def test_git_state_is_of_the_checkout_that_tracks_the_package_and_of_no_other(
    tmp_path: Path,
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    git("init", "--quiet")
    assert git_state(package) is None  # lies in a checkout that does not track it
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_the_curve_is_a_picture_with_a_panel_for_all_that_was_logged(tmp_path: Path) -> None:
    with metrics(tmp_path) as records:
        for step in range(3):
            records.log(step, {"reward/mean": 0.1 * step, "rollout/response_length": 12.0})
    width, height = Image.open(plot_run(tmp_path)).size
    with metrics(tmp_path, first_step=3) as records:
        held_out = {"accuracy": 0.4, "accuracy_low": 0.4000001, "accuracy_high": 0.45}
        gap = {"teacher/gap_mean": math.nan}
        records.log(3, {f"evaluation/{name}": value for name, value in held_out.items()} | gap)
    wider, same_height = Image.open(plot_run(tmp_path)).size
    assert (wider, same_height) == (width * 3 // 2, height)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_a_run_without_rows_cannot_be_plotted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no rows"):
        plot_run(tmp_path)
