"""Boxes are the range, element by element, and few."""

import itertools
from math import prod

import numpy as np
import pytest

from megasd.weights.boxes import boxes


@pytest.mark.parametrize("shape", [(7,), (1, 5), (4, 3), (5, 1), (3, 2, 4), (2, 1, 3, 2)])
def test_every_range_is_its_boxes_in_order(shape: tuple[int, ...]) -> None:
    tensor = np.arange(prod(shape)).reshape(shape)
    for start, end in itertools.combinations_with_replacement(range(prod(shape) + 1), 2):
        found = list(boxes(shape, start, end))
        parts = [
            tensor[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].ravel()
            for offset, size in found
        ]
        assert np.concatenate([np.arange(0), *parts]).tolist() == list(range(start, end))
        assert len(found) <= 2 * len(shape) - 1
