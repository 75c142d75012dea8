"""Quantiles and statistics of rollouts, against numpy's and whatever the blocks are."""

import numpy as np
import pytest
import torch

from megasd.losses import distillation, per_rollout
from megasd.losses.distillation import future_credit
from megasd.losses.quantile import quantile
from megasd.losses.selection import only_highest_entropy
from megasd.types import Credit, ResponseBatch
from tests.distributed.planner_cases import LiveStorages

LENGTHS = [3, 0, 1, 7, 2, 5, 1, 9, 4, 0]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.95, 0.99, 1.0])
def test_a_quantile_is_numpys(share: float) -> None:
    draw = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 20, 101):
        values = (torch.randn(size, generator=draw) * 4).round() / 4
        expected = np.quantile(values.double().numpy(), share)
        assert quantile(values, share) == pytest.approx(expected, abs=1e-12)


def a_batch() -> ResponseBatch:
    draw = torch.Generator().manual_seed(1)
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return ResponseBatch(
        rewards=torch.zeros(len(LENGTHS)),
        is_correct=torch.zeros(len(LENGTHS), dtype=torch.bool),
        group_ids=torch.arange(len(LENGTHS)),
        minibatch_ids=torch.arange(len(LENGTHS)) // 5,
        rollout_ids=ids,
        response_mask=torch.rand(len(ids), generator=draw) < 0.8,
        max_response_tokens=9,
        entropy=torch.rand(len(ids), generator=draw),
    )


def test_blocks_are_whole_rollouts_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: blocks of at most 8 tokens, or of one rollout that has more."""
    batch = a_batch()
    values = batch.entropy
    assert values is not None

    def everything() -> list[torch.Tensor]:
        return [
            per_rollout.quantile(values, 0.3, batch),
            per_rollout.mean(values, batch),
            per_rollout.mean_absolute_deviation(values, batch),
            per_rollout.router(values, 0.3, batch, shape="tanh"),
            *future_credit(values, batch.response_mask, batch.rollout_ids),
            distillation.confidence_weights(
                values, batch.response_mask, batch.minibatch_ids[batch.rollout_ids], beta=2.0
            ),
        ]

    whole = everything()
    monkeypatch.setattr(per_rollout, "BLOCK", 8)
    monkeypatch.setattr(distillation, "BLOCK", 8)
    cuts = per_rollout.blocks(batch.rollout_ids)
    assert [cut.stop - cut.start for cut in cuts] == [4, 7, 8, 9, 4]
    for one, other in zip(everything(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    shuffled = batch.rollout_ids.flip(0)
    assert per_rollout.blocks(shuffled) == [slice(0, len(shuffled))]


def test_of_equal_entropies_the_first_of_a_mini_batch_are_learnt_from() -> None:
    batch = a_batch()
    assert batch.entropy is not None
    batch.entropy[:] = (batch.entropy * 4).round()
    path, entropy = batch.response_mask.long() - 1, batch.entropy.tolist()
    ones = torch.ones_like(batch.entropy)
    chosen = only_highest_entropy(Credit(ones, ones, path), batch, share=0.3).path >= 0
    for minibatch in (0, 1):
        tokens = ((path >= 0) & (batch.minibatch_ids[batch.rollout_ids] == minibatch)).nonzero()
        order = sorted(tokens[:, 0].tolist(), key=lambda i: (-entropy[i], i))
        expected = set(order[: int(np.ceil(0.3 * len(order)))])
        assert {i for i in tokens[:, 0].tolist() if chosen[i]} == expected


def test_distances_to_log_take_few_bytes_per_token() -> None:
    from megasd.losses import mismatch

    size = 2**20
    old, rollout = torch.rand(size), torch.rand(size)
    mask = torch.ones(size, dtype=torch.bool)
    whole = mismatch.mismatch_metrics(old, rollout, mask)
    with pytest.MonkeyPatch.context() as patch, LiveStorages() as storages:
        patch.setattr(mismatch, "_BLOCK", 2**14)
        assert mismatch.mismatch_metrics(old, rollout, mask) == pytest.approx(whole, rel=1e-9)
    assert storages.peak < 18 * size
