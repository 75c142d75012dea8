"""The inspection tool tells a run's checkpoint that is as it was written from one that is not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import inspect_checkpoint
import pytest

from megasd.checkpoint.manifest import MANIFEST_FILE
from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3
from tests.distributed import checkpoint_cases as cases
from tests.unit.weights.test_convert import run_tool


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """The checkpoint of a run."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_qwen3(folder / "model", vocab=121)
    ranks.run(cases.restore_and_save, model, folder, world_size=1)
    return folder / "checkpoints" / "step_000001"


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


DATA, BACKEND = "__0_0.distcp", "metadata.json"
# What is done to the folder, what is said of it, and whether without --checksums too.
BREAKAGES: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "nothing": (lambda folder: None, "no problems found", True),
    "no manifest": (
        lambda folder: (folder / MANIFEST_FILE).unlink(),
        "problem: there is no manifest.json: the checkpoint was not finished",
        True,
    ),
    "half a manifest": (
        lambda folder: (folder / MANIFEST_FILE).write_text('{"files": {'),
        "problem: the checkpoint has a manifest.json that cannot be read",
        True,
    ),
    "a longer file": (lambda folder: _lengthen(folder / DATA), f"problem: {DATA} has ", True),
    "a file gone": (
        lambda folder: (folder / BACKEND).unlink(),
        f"problem: {BACKEND} is missing",
        True,
    ),
    "another byte": (  # after the records: no checksum of a record covers it
        lambda folder: _flip_last_byte(folder / DATA),
        f"problem: {DATA} has other bytes than were written",
        False,
    ),
}


@pytest.mark.parametrize("broken", BREAKAGES)
@pytest.mark.parametrize("checksums", [False, True])
def test_the_files_of_a_run_are_compared_with_its_manifest(
    broken: str,
    checksums: bool,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it, sentence, seen_by_size = BREAKAGES[broken]
    folder = shutil.copytree(saved, tmp_path / "step_000001")
    break_it(folder)
    options = ("--checksums",) if checksums else ()
    code = run_tool(inspect_checkpoint, folder, *options, monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    if seen_by_size or checksums:
        assert sentence in said
        assert code == (broken != "nothing")
    else:
        assert "no problems found" in said
        assert code == 0
