"""Killed at any moment and resumed: the run that was never killed, to the bit."""

import contextlib
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.process import interrupt
from megasd.testing.forked import Forked, complete
from tests.decoys import install_decoys
from tests.end_to_end import workspace

STEPS = 44
EVENTS = [*["kill"] * 5, *["terminate"] * 4, *["full disk"] * 6, *["damage"] * 5]


class Torture:
    """One run, started again whenever it is gone."""

    def __init__(self, config: Path, run: Path, draw: random.Random, sizes: list[int]) -> None:
        self.run, self.draw, self.sizes = run, draw, sizes
        self.endings: list[int] = []
        self.errors = ""
        self.process = self.start(config)

    def start(self, *arguments: str | Path) -> Forked:
        (process,) = workspace.start("train", *arguments)
        return process

    def reach(self, rows: int) -> None:
        """Until the run has so many rows, started again as often as it takes."""
        deadline = time.monotonic() + 120
        self.revive()
        while self.rows() < rows:
            assert time.monotonic() < deadline, f"no progress: {self.errors}"
            self.revive()
            time.sleep(0.01)

    def revive(self) -> None:
        if self.process.poll() is not None:
            self.bury()
            self.process = self.start("--resume", self.run)

    def rows(self) -> int:
        try:
            return len(read_rows(self.run / METRICS_FILE))
        except FileNotFoundError:
            return 0

    def bury(self) -> None:
        """A disk that stays full for too long ends a run with a sentence, SIGKILL without one."""
        _, errors = self.process.communicate()
        code = self.process.wait()
        self.errors += errors
        codes = (1, interrupt.EXIT_CODE, -signal.SIGKILL)
        if code != -signal.SIGTERM:  # it had not begun to listen
            assert code in codes, f"exit code {code}: {self.errors}"
        assert code != 1 or "could not be written" in errors or "cannot be written" in errors
        self.endings.append(code)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the disk was too full for too long
            os.killpg(self.process.pid, signal.SIGKILL)

    def terminate(self) -> None:
        self.process.terminate()
        self.process.wait()

    def full_disk(self) -> None:
        """No file can grow beyond one of `sizes`, for a while."""
        limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), self.draw.choice(self.sizes)
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, limits[1]))
            time.sleep(self.draw.uniform(0.2, 1.0))
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)

    def damage(self) -> None:
        """kill -9, and a file of the newest checkpoint is cut short; there is one before it."""
        checkpoints, deadline = self.run / "checkpoints", time.monotonic() + 120
        while len(list(checkpoints.glob("step_*"))) < 2:
            assert time.monotonic() < deadline, f"no two checkpoints: {self.errors}"
            self.revive()
            time.sleep(0.01)
        self.kill()
        self.process.wait()
        file = self.draw.choice(sorted(max(checkpoints.glob("step_*")).iterdir()))
        os.truncate(file, self.draw.randrange(max(1, file.stat().st_size)))


@pytest.mark.slow
def test_twenty_disasters_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """kill -9, SIGTERM, a full disk and checkpoints cut short: the undisturbed run, to the bit."""
    folder = workspace.make(tmp_path)
    done = workspace.train(workspace.config(folder, "whole", steps=STEPS))
    assert done.returncode == 0, done.stderr

    draw = random.Random(7)
    events = draw.sample(EVENTS, len(EVENTS))
    run = folder / "tortured"
    # Too little for metrics.jsonl, which ends the run; enough for it, and for no checkpoint.
    rows_need = (folder / "whole" / METRICS_FILE).stat().st_size
    newest = folder / "whole" / "checkpoints" / f"step_{STEPS:06d}"
    save_needs = max(file.stat().st_size for file in newest.iterdir())
    assert 10_000 < rows_need < save_needs
    sizes = [10_000, (rows_need + save_needs) // 2]
    torture = Torture(workspace.config(folder, "tortured", steps=STEPS), run, draw, sizes)
    for event, rows in zip(events, sorted(draw.sample(range(1, STEPS - 6), 20)), strict=True):
        torture.reach(rows)
        time.sleep(draw.uniform(0.0, 0.3))  # over rollout, update and the writing of a checkpoint
        getattr(torture, event.replace(" ", "_"))()
    torture.reach(STEPS + 1)
    _, errors = torture.process.communicate()
    assert torture.process.returncode == 0, errors
    assert len(torture.endings) >= len(EVENTS) - EVENTS.count("full disk")
    assert "is put aside" in torture.errors + errors

    assert workspace.untimed_rows(run) == workspace.untimed_rows(folder / "whole")
    assert [row["step"] for row in workspace.untimed_rows(run)] == [*range(STEPS), STEPS]
    for name in ("hf/model.safetensors", "hf/config.json"):
        assert (run / name).read_bytes() == (folder / "whole" / name).read_bytes()
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"step_{STEPS - 2:06d}", f"step_{STEPS:06d}"], "the newest two, no debris"


@pytest.mark.slow
def test_a_run_of_four_ranks_resumes_and_exports_what_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP2 x PP2 under torchrun: the metrics of a run cut in two are those of the whole one.

    Transformer Engine and apex are installed, as in the containers of a GPU cluster: on a CPU
    neither may be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = [str(install_decoys(tmp_path / "installed")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    folder = workspace.make(tmp_path)
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    whole = workspace.config(folder, "whole", steps=4, every=2)
    done = workspace.torchrun(whole, *layout, "optimizer.schedule=constant", ranks=4)
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
    done = complete(workspace.start("export", folder / "whole", "--to", exported))
    assert done.returncode == 0, done.stderr
    ours = (folder / "whole" / "hf" / "model.safetensors").read_bytes()
    assert (exported / "model.safetensors").read_bytes() == ours
