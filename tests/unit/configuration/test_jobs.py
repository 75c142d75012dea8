"""The configs of real jobs: each fits the GPUs that its first line names, and passes a dry run."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megasd.cli import main
from megasd.configuration.load import load_config
from megasd.planner.command import make_plan
from megasd.rewards import sandbox
from megasd.testing.hollow import hollow_qwen3

FOLDER = Path(__file__).parents[3] / "configs" / "jobs"
JOBS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("base"))


def gpus_of(path: Path) -> tuple[str, int]:
    """`GPUs: H200:16 (2 nodes)` of the first line."""
    found = re.search(
        r"GPUs: ([A-Z]+\d+:(\d+)) \((\d+) nodes?\)$", path.read_text().splitlines()[0]
    )
    assert found is not None, path
    assert int(found[2]) == 8 * int(found[3])
    return found[1], int(found[2])


@pytest.fixture(scope="module")
def _workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("jobs")
    for size in ("8B", "30B-A3B", "235B-A22B"):
        hollow_qwen3(folder / "models" / f"Qwen3-{size}", size)
    (folder / "data").mkdir()
    row = '{"prompt": "1 + 1 =", "answer": "2", "solution": "It is 2."}\n'
    (folder / "data" / "train.jsonl").write_text(row)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def test_every_method_and_model_that_is_promised_has_a_job() -> None:
    found = {path.stem for path in JOBS}
    for method in ("rlsd", "dasd", "distil"):
        assert {f"{method}_30b_a3b", f"{method}_235b_a22b"} <= found
        assert any(name.startswith(f"{method}_8b") for name in found)
    assert len({load_config(path).run.name for path in JOBS}) == len(JOBS)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_fits_the_gpus_of_its_first_line(path: Path) -> None:
    gpus, _ = gpus_of(path)
    plan = make_plan([str(path)], gpus=gpus, suggest=False)
    assert plan.faults == []
    assert plan.fits


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_passes_the_dry_run_on_as_many_ranks(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "check", lambda: None)  # of the machine, not of the job
    _, count = gpus_of(path)
    code = main(["train", str(path), "--dry-run", "--world-size", str(count)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert f"ranks:       {count} = " in out
