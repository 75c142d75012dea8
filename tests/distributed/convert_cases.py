"""What ranks run for the tests of conversion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed import checkpoint_cases as checkpoints
from tests.distributed import policy_cases as cases


def read_converted(
    folder: Path, runs: list[Path], settings: Mapping[str, Any]
) -> list[dict[str, np.ndarray]]:
    """The weights of a policy of another model after each of the checkpoints was loaded."""
    policy = cases.make_policy(folder, settings)
    read = [cases.weights_of(policy)]
    for run in runs:
        checkpoints.restore_weights(policy, run)
        read.append(cases.weights_of(policy))
    return read


def save_and_export(folder: Path, run: Path, settings: Mapping[str, Any]) -> None:
    """A checkpoint after a training step, and the same weights exported to RUN/hf."""
    policy, prompts, saved = checkpoints._a_run(folder, run, settings)
    from megasd.checkpoint.export import export_hf

    checkpoints._learn(policy, prompts, range(1))
    saved.save(1)
    export_hf(policy, folder, run / "hf", replace=False)
