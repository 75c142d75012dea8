"""What ranks run for the tests of memory that is lent out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.distributed import checkpoint_cases
from tests.distributed import policy_cases as cases


def lend_memory_between_steps(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What three steps came to, and how many bytes were given away and left of what, by kind."""
    policy, prompts, _ = checkpoint_cases._a_run(folder, run_folder, settings)
    from megasd.policy.parking import gradients, optimizer_state

    lent = {
        "gradients": list(gradients(policy.state)),
        "optimizer": list(optimizer_state(policy.state)),
        "teacher": policy.teacher.kept,
        "reference": policy._reference.kept,
        "weights": [bucket.data for bucket in policy.buckets],
    }

    def sizes() -> dict[str, int]:
        storages = {
            name: {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
            for name, tensors in lent.items()
        }
        return {name: sum(of.values()) for name, of in storages.items()}

    seen, sent, held = [], {}, [sizes()]
    for step in range(3):
        policy.park()
        policy.park()  # as a loop does that was parked from the start
        held.append(sizes())
        assert policy.is_parked == settings["parks"]
        sent = cases.weights_of(policy)
        policy.unpark()
        assert not policy.is_parked
        held.append(sizes())
        seen += checkpoint_cases._learn(policy, prompts, range(step, step + 1))
    return {**checkpoint_cases._everything(policy, seen), "sent": sent, "held": held}
