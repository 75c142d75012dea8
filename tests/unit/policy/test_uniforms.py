"""Draws that belong to a place in response space, not to a pass over it."""

import numpy as np
import torch

from megasd.policy.uniforms import uniforms, words


def test_the_words_are_splitmix64s() -> None:
    """Its published outputs for the seed 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = words(1234567, torch.arange(5)).numpy().astype(np.uint64)
    assert found.tolist() == published


def test_a_tokens_draws_are_the_same_however_the_batch_is_cut() -> None:
    whole = uniforms((3, 1), torch.arange(1000), 7)
    some = torch.tensor([999, 0, 512, 513])
    assert torch.equal(uniforms((3, 1), some, 7), whole[some])
    assert uniforms((3, 1), some[:0], 7).shape == (0, 7)
    assert not torch.isin(uniforms((3, 2), some, 7), whole[some]).any(), "another step, other draws"


def test_they_fill_the_unit_interval_evenly_and_without_memory() -> None:
    drawn = uniforms((11,), torch.arange(50_000), 4)
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    expected = drawn.numel() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 150, "chi squared of 99 degrees"
    between = np.corrcoef(np.concatenate([drawn[:-1].T, drawn[1:].T]))  # samples, and neighbours
    assert np.abs(between - np.eye(8)).max() < 5 / 50_000**0.5
