"""Whose weights read the privileged context."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from megasd.policy.config import TeacherConfig
from megasd.policy.megatron.buckets import Bucket
from megasd.policy.teacher import TeacherWeights

Kept = Literal["frozen", "snapshot", "ema"]


class Weights:
    """Two parameters in a bucket, with a gap between them and filling at the end."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        data = torch.tensor([1.0, 2.0, -1.0, 3.0, -1.0], dtype=dtype)
        self.a, self.b = torch.nn.Parameter(data[:2]), torch.nn.Parameter(data[3:4].view(1, 1))
        self.bucket = Bucket(data=data, parameters={"a": (self.a, 0), "b": (self.b, 3)}, group=None)

    def teacher(self, weights: Kept | Literal["live"], **settings: float) -> TeacherWeights:
        return TeacherWeights(TeacherConfig(weights=weights, **settings), [self.bucket])  # pyright: ignore

    def move(self, step: float) -> None:
        with torch.no_grad():
            self.a.add_(step)
            self.b.add_(step)

    def seen(self, teacher: TeacherWeights) -> list[float]:
        with teacher.swapped_in():
            return [*self.a.tolist(), self.b.item()]

    @property
    def places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in (self.a, self.b)]


def test_live_reads_with_the_policys_own_weights_and_keeps_no_copy() -> None:
    live = Weights()
    teacher = live.teacher("live")
    live.move(1.0)
    assert live.seen(teacher) == [2.0, 3.0, 4.0]
    assert teacher.kept == []


def test_frozen_stays_at_the_initial_weights() -> None:
    live = Weights()
    teacher = live.teacher("frozen")
    for step in range(20):
        live.move(1.0)
        teacher.after_batch(step, updated=True)
    assert live.seen(teacher) == [1.0, 2.0, 3.0]


def test_snapshot_is_the_policy_of_the_last_multiple_of_k_batches() -> None:
    live = Weights()
    teacher = live.teacher("snapshot", every=3)
    first = []
    for step in range(7):
        live.move(1.0)
        teacher.after_batch(step, updated=True)
        first.append(live.seen(teacher)[0])
    assert first == [1.0, 1.0, 4.0, 4.0, 4.0, 7.0, 7.0]


def test_ema_follows_by_one_minus_decay_and_skips_batches_that_changed_nothing() -> None:
    live = Weights()
    teacher = live.teacher("ema", decay=0.75)
    live.move(4.0)
    teacher.after_batch(0, updated=True)
    assert live.seen(teacher) == [2.0, 3.0, 4.0]  # 0.75 x 1 + 0.25 x 5
    teacher.after_batch(1, updated=False)
    assert live.seen(teacher) == [2.0, 3.0, 4.0]


def test_ema_of_bfloat16_weights_does_not_round_its_small_steps_away() -> None:
    live = Weights(torch.bfloat16)
    teacher = live.teacher("ema", decay=0.999)
    live.move(1.0)
    for step in range(100):
        teacher.after_batch(step, updated=True)
    torch.testing.assert_close(
        teacher.kept[0][:2], torch.tensor([2.0, 3.0]) - 0.999**100, rtol=1e-5, atol=0
    )
    with teacher.swapped_in():
        assert torch.equal(live.a, teacher.kept[0][:2].bfloat16()), "rounded once, for the pass"


@pytest.mark.parametrize("weights", ["frozen", "snapshot", "ema"])
def test_the_policy_is_itself_again_after_the_pass_to_the_bit_even_after_an_error(
    weights: Kept,
) -> None:
    live = Weights()
    teacher = live.teacher(weights)
    live.move(0.1)
    before, places = [p.detach().clone() for p in (live.a, live.b)], live.places
    with pytest.raises(KeyError), teacher.swapped_in():
        raise KeyError
    assert torch.equal(live.a, before[0])
    assert torch.equal(live.b, before[1])
    assert live.places == places, "the optimizer's slices are views of the same memory"


@pytest.mark.parametrize("weights", ["frozen", "snapshot"])
def test_kept_weights_take_the_policys_place_without_a_copy_of_either(weights: Kept) -> None:
    live = Weights()
    teacher = live.teacher(weights)
    live.move(1.0)
    data = live.bucket.data.clone()
    with teacher.swapped_in():
        kept = teacher.kept[0]
        assert live.places == [kept[:1].data_ptr(), kept[3:].data_ptr()]
        assert torch.equal(live.bucket.data, data), "the student's are where they were"
        head: Tensor = live.a.detach()
    live.move(1.0)
    assert head.tolist() == [1.0, 2.0], "who holds it holds the teacher's"
    assert teacher.stay


def test_what_a_pass_reads_of_live_or_averaged_weights_does_not_stay() -> None:
    assert not Weights().teacher("live").stay
    assert not Weights().teacher("ema").stay
