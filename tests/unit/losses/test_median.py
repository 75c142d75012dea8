"""Medians of values, and of counts of them."""

import statistics

import numpy as np
import pytest
import torch

from megasd.losses.median import add_to_counts, median

NOTHING = (torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def test_the_median_is_that_of_the_standard_library() -> None:
    draw = np.random.default_rng(0)
    for size in (1, 2, 3, 4, 5, 50, 51):
        values = draw.integers(0, 9, size) / 8
        assert median(torch.tensor(values)) == statistics.median(values)


def test_values_are_counted_batch_by_batch_and_their_median_is_that_of_all() -> None:
    draw = np.random.default_rng(1)
    batches = [draw.gamma(0.3, size=n).astype(np.float32) for n in (1, 0, 700, 3, 44)]
    values, counts = NOTHING
    for batch in batches:
        values, counts = add_to_counts(values, counts, torch.from_numpy(batch))
    everything = np.concatenate(batches).tolist()
    assert counts.sum() == len(everything)
    assert median(values, counts) == pytest.approx(statistics.median(everything), rel=2**-12)


def test_what_is_kept_does_not_grow_with_the_number_of_values() -> None:
    values, counts = NOTHING
    entropies = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 1  # 1 to 2 nats
    for _ in range(3):
        values, counts = add_to_counts(values, counts, entropies)
    assert len(values) == len(counts) == 2**11 + 1
    assert counts.sum() == 600_000
    assert values.dtype == torch.float32
    short = torch.tensor([0.0, 2.25, 3.0, 4095 / 1024])
    assert torch.equal(add_to_counts(*NOTHING, short)[0], short), "12 bits are kept as they are"
