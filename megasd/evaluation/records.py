"""The responses of every evaluation, counted by prompt: RUN/evaluations/step_NNNNNN.json.

What compares two runs prompt by prompt needs them; metrics.jsonl holds only their means. A resumed
run writes the same files again.
"""

import json
import os
from pathlib import Path

from megasd.evaluation.evaluate import Counts


def write_counts(run_folder: Path, step: int, counts: Counts) -> None:
    path = _path(run_folder, step)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(counts._asdict()) + "\n", encoding="utf-8")
    os.replace(partial, path)  # a file that bears its name is whole


def read_counts(run_folder: Path, step: int) -> Counts:
    return Counts(**json.loads(_path(run_folder, step).read_text(encoding="utf-8")))


def _path(run_folder: Path, step: int) -> Path:
    return run_folder / "evaluations" / f"step_{step:06d}.json"
