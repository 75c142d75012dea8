"""Whose weights read the privileged context."""

from typing import Literal

import pytest
import torch

from megasd.policy.config import TeacherConfig
from megasd.policy.teacher import TeacherWeights


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    return {
        "a": torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype)),
        "b": torch.nn.Parameter(torch.tensor([[3.0]], dtype=dtype)),
    }


def move(live: dict[str, torch.nn.Parameter], step: float) -> None:
    with torch.no_grad():
        for parameter in live.values():
            parameter.add_(step)


def seen(teacher: TeacherWeights, live: dict[str, torch.nn.Parameter]) -> list[float]:
    with teacher.swapped_in():
        return [float(value) for parameter in live.values() for value in parameter.flatten()]


def test_live_reads_with_the_policys_own_weights_and_keeps_no_copy() -> None:
    live = parameters()
    teacher = TeacherWeights(TeacherConfig(weights="live"), live)
    move(live, 1.0)
    assert seen(teacher, live) == [2.0, 3.0, 4.0]
    assert teacher.tensors == {}


def test_frozen_stays_at_the_initial_weights() -> None:
    live = parameters()
    teacher = TeacherWeights(TeacherConfig(weights="frozen"), live)
    for step in range(20):
        move(live, 1.0)
        teacher.after_batch(step, updated=True)
    assert seen(teacher, live) == [1.0, 2.0, 3.0]


def test_snapshot_is_the_policy_of_the_last_multiple_of_k_batches() -> None:
    live = parameters()
    teacher = TeacherWeights(TeacherConfig(weights="snapshot", every=3), live)
    first = []
    for step in range(7):
        move(live, 1.0)
        teacher.after_batch(step, updated=True)
        first.append(seen(teacher, live)[0])
    assert first == [1.0, 1.0, 4.0, 4.0, 4.0, 7.0, 7.0]


def test_ema_follows_by_one_minus_decay_and_skips_batches_that_changed_nothing() -> None:
    live = parameters()
    teacher = TeacherWeights(TeacherConfig(weights="ema", decay=0.75), live)
    move(live, 4.0)
    teacher.after_batch(0, updated=True)
    assert seen(teacher, live) == [2.0, 3.0, 4.0]  # 0.75 x 1 + 0.25 x 5
    teacher.after_batch(1, updated=False)
    assert seen(teacher, live) == [2.0, 3.0, 4.0]


def test_ema_of_bfloat16_weights_does_not_round_its_small_steps_away() -> None:
    live = parameters(torch.bfloat16)
    teacher = TeacherWeights(TeacherConfig(weights="ema", decay=0.999), live)
    move(live, 1.0)
    for step in range(100):
        teacher.after_batch(step, updated=True)
    torch.testing.assert_close(
        teacher.tensors["a"], torch.tensor([2.0, 3.0]) - 0.999**100, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("weights", ["frozen", "snapshot", "ema"])
def test_the_policy_is_itself_again_after_the_pass_to_the_bit_even_after_an_error(
    weights: Literal["frozen", "snapshot", "ema"],
) -> None:
    live = parameters()
    teacher = TeacherWeights(TeacherConfig(weights=weights), live)
    move(live, 0.1)
    before = {name: parameter.detach().clone() for name, parameter in live.items()}
    with pytest.raises(KeyError), teacher.swapped_in():
        raise KeyError
    for name, parameter in live.items():
        assert torch.equal(parameter, before[name])
        assert parameter is live[name], "the optimizer holds these objects"
