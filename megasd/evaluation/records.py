"""The responses of every evaluation, counted by prompt: RUN/evaluations/step_NNNNNN.json.

What compares two runs prompt by prompt needs them; metrics.jsonl holds only their means. A resumed
run writes the same files again.
"""

import json
import warnings
from pathlib import Path

from megasd.evaluation.evaluate import Counts
from megasd.process.durable import write_durably


def write_counts(run_folder: Path, step: int, counts: Counts) -> None:
    """A file that cannot be written is a warning: no record ends a run."""
    path = _path(run_folder, step)
    try:
        path.parent.mkdir(exist_ok=True)
        write_durably(path, json.dumps(counts._asdict()) + "\n")
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({error.strerror}): comparisons of runs will miss it",
            stacklevel=2,
        )


def read_counts(run_folder: Path, step: int) -> Counts:
    path = _path(run_folder, step)
    try:
        return Counts(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: the counts of this evaluation cannot be read ({error}); remove {run_folder} "
            "to have that run trained again"
        ) from error


def _path(run_folder: Path, step: int) -> Path:
    return run_folder / "evaluations" / f"step_{step:06d}.json"
