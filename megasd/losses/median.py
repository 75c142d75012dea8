"""Medians, also of more values than anybody wants to keep."""

import torch
from torch import Tensor

from megasd.losses.quantile import quantile


def median(values: Tensor, counts: Tensor | None = None) -> float:
    """Of `values`, or of `counts` of each; of an even number the mean of the middle two."""
    if counts is None:
        return quantile(values, 0.5)
    ascending, order = values.double().sort()
    ends = counts[order].cumsum(0)
    middle = torch.stack([ends[-1] - 1, ends[-1]]) // 2
    return ascending[torch.searchsorted(ends, middle, right=True)].mean().item()


def add_to_counts(values: Tensor, counts: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """`values` and `counts` with one of each of `more`, rounded to 12 bits: 2048 for a power of 2.

    So what is kept does not grow with the number of values, but with their range.
    """
    fraction, exponent = torch.frexp(torch.cat([values, more]))
    rounded = torch.ldexp((fraction * 2**12).round() / 2**12, exponent)
    merged, index = rounded.unique(return_inverse=True)
    times = torch.cat([counts, torch.ones_like(more, dtype=torch.int64)])
    return merged, torch.zeros_like(merged, dtype=torch.int64).index_add(0, index, times)
