"""What float8 moves is measured on a bounded draw of the batch, at the steps that are asked for."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megasd.loop.meter import Meter, sample
from megasd.losses.mismatch import precision_metrics
from megasd.policy.config import FP8Config
from megasd.types import View


@dataclass
class PlayedPolicy:
    """Float8 moves each log-prob by a hundredth of its token's id."""

    fp8: FP8Config | None
    read: list[int] = field(default_factory=list)

    @property
    def state(self) -> Any:
        layout = SimpleNamespace(dp_size=2)
        return SimpleNamespace(fp8=self.fp8, max_tokens_per_microbatch=20, layout=layout)

    def score_in_both(self, views: Any, offsets: np.ndarray) -> tuple:
        ids = torch.from_numpy(np.concatenate([view.response_ids for view in views]))
        assert offsets.tolist() == np.cumsum([0] + [len(v.response_ids) for v in views]).tolist()
        self.read = [len(view.prompt_ids) for view in views]
        return -ids * 0.01 - 1.0, torch.full((len(ids),), -1.0)


def experience() -> Any:
    """Seven rollouts of 8 tokens; the i-th has a prompt of i + 1 of them and the ids of its own."""
    views = [
        View(prompt_ids=np.arange(i + 1), response_ids=np.full(7 - i, i, dtype=np.int64))
        for i in range(7)
    ]
    return SimpleNamespace(student_views=views)


def test_the_steps_that_measure_are_those_of_the_configuration() -> None:
    for fp8, steps in (
        (None, []),
        (FP8Config(meter_every=0), []),
        (FP8Config(meter_every=3), [0, 3, 6]),
    ):
        meter = Meter(PlayedPolicy(fp8), seed=1)  # pyright: ignore[reportArgumentType]
        assert [step for step in range(8) if meter.measure(experience(), step)] == steps


def test_one_micro_batch_per_rank_is_read_another_at_each_step_and_its_difference_logged() -> None:
    policy, seen = PlayedPolicy(FP8Config(meter_every=1)), set()
    meter = Meter(policy, seed=1)  # pyright: ignore[reportArgumentType]
    for step in range(8):
        values = meter.measure(experience(), step)
        assert len(policy.read) == 5, "of 8 tokens each, within 2 x 20"
        ids = np.concatenate([np.full(8 - prompt, prompt - 1) for prompt in policy.read])
        assert values["fp8/abs_mean"] == pytest.approx(ids.mean() * 0.01, abs=1e-6)
        seen.add(tuple(policy.read))
    assert len(seen) > 1


def test_a_sequence_longer_than_the_budget_is_read_all_the_same() -> None:
    assert sample([50], max_tokens=20, seed=(1, 2)) == [0]


def test_the_differences_are_summed_up_as_defined() -> None:
    x = np.array([0.3, -0.2, 0.0, 0.1])
    plain = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    found = precision_metrics(plain + torch.from_numpy(x).float(), plain)
    assert found["abs_mean"] == pytest.approx(0.15, abs=1e-6)
    assert found["abs_p99"] == pytest.approx(0.2 + 0.97 * 0.1, abs=1e-6)
    assert found["k3"] == pytest.approx(np.mean([math.exp(v) - 1 - v for v in x]), abs=1e-6)
    odd = precision_metrics(torch.tensor([float("nan"), -1.0]), torch.tensor([-1.0, -1.0]))
    assert all(math.isnan(value) for value in odd.values())
