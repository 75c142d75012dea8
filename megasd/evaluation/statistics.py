"""Accuracy of k sampled responses per prompt, with intervals. Plain numpy.

Prompts are the unit of chance: responses to one prompt resemble each other, so an interval that
counted every response as independent would be too narrow.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over prompts with its 95% interval. NaN where no prompt could be judged."""

    mean: float
    low: float
    high: float


def average_at_k(successes: Sequence[int], samples: Sequence[int], *, seed: int) -> Estimate:
    """avg@k: the mean over prompts of the share of its responses that are right.

    `successes[p]` of `samples[p]` judged responses are right; prompts without any are left out.
    """
    right, judged = _counts(successes, samples)
    has_any = judged > 0
    return bootstrap(right[has_any] / judged[has_any], seed=seed)


def pass_at_k(successes: Sequence[int], samples: Sequence[int], k: int, *, seed: int) -> Estimate:
    """pass@k: the chance that k responses drawn from a prompt's n hold a right one.

    1 - C(n - c, k) / C(n, k) per prompt, unbiased for any n >= k (eq. 1 of arXiv:2107.03374).
    Prompts with fewer than k judged responses are left out.
    """
    right, judged = _counts(successes, samples)
    has_k = judged >= k
    return bootstrap(
        [_pass_at_k(c, n, k) for c, n in zip(right[has_k], judged[has_k], strict=True)], seed=seed
    )


def _pass_at_k(right: int, samples: int, k: int) -> float:
    # As a product, the binomials of large n would overflow: zero as soon as n - c < k.
    ratios = 1.0 - k / np.arange(samples - right + 1, samples + 1)
    return float(1.0 - np.prod(np.maximum(ratios, 0.0)))


def bootstrap(
    values: Sequence[float] | np.ndarray, *, seed: int, resamples: int = 2000
) -> Estimate:
    """Mean of per-prompt `values` and its percentile bootstrap interval (2.5% to 97.5%).

    Prompts are drawn with replacement from a generator of `seed`: the same numbers every time.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        return Estimate(np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    # In blocks of about a million draws: neither a Python loop per resample nor gigabytes.
    block = max(1, 2**20 // values.size)
    means = [
        values[
            generator.integers(values.size, size=(min(block, resamples - done), values.size))
        ].mean(axis=1)
        for done in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def bootstrap_over_seeds(values: np.ndarray, *, seed: int, resamples: int = 2000) -> Estimate:
    """Mean of `values` [S seeds, P prompts] and an interval that counts both as chance.

    Every resample draws P prompts and, apart from them, S - 1 seeds, both with replacement: the
    mean of n - 1 draws spreads as far as a mean of n does (Rao and Wu, 1988), which matters for two
    or three seeds. Of one seed the interval counts prompts only. NaN where nothing was judged.
    """
    num_seeds, num_prompts = values.shape
    if values.size == 0:
        return Estimate(np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for resample in range(resamples):
        seeds = generator.integers(num_seeds, size=max(1, num_seeds - 1))
        prompts = generator.integers(num_prompts, size=num_prompts)
        means[resample] = values[np.ix_(seeds, prompts)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def _counts(successes: Sequence[int], samples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    right, judged = np.asarray(successes, dtype=np.int64), np.asarray(samples, dtype=np.int64)
    assert right.shape == judged.shape, "one count of each per prompt"
    assert (right >= 0).all(), "successes are counts"
    assert (right <= judged).all(), "more successes than samples"
    return right, judged
