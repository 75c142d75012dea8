"""What each optimizer step's learning rate is: of the configuration and the step's number."""

from typing import Any

import numpy as np
import pytest

from megasd.policy.config import OptimizerConfig
from megasd.policy.schedule import learning_rate


def rates(steps: int, total_steps: int | None = None, **config: Any) -> list[float]:
    optimizer = OptimizerConfig(**{"lr": 1.0, **config})
    total = total_steps or steps
    return [learning_rate(optimizer, k, total_steps=total) for k in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_step_k_of_the_warm_up_is_at_k_of_its_steps(schedule: str) -> None:
    assert rates(6, schedule=schedule, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1]


def test_the_decay_begins_at_the_top_and_the_last_step_still_learns() -> None:
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(6, schedule="linear", warmup_steps=2)[2:] == [1, 0.75, 0.5, 0.25]
    cosine = [0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    assert rates(6, schedule="cosine", warmup_steps=2)[2:] == pytest.approx(cosine, rel=1e-12)
    assert rates(6, warmup_steps=2)[2:] == [1, 1, 1, 1]


def test_it_decays_towards_the_floor_and_stays_there_behind_the_end() -> None:
    assert rates(4, schedule="linear", min_lr=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert rates(6, 2, schedule="cosine", min_lr=0.2) == pytest.approx([1, 0.6] + [0.2] * 4)
    assert rates(3, 2, schedule="linear", warmup_steps=2) == [0.5, 1, 1], "nothing to decay over"
    assert rates(3, schedule="constant", min_lr=2.0) == [1, 1, 1], "the floor is of a decay"
