"""A range of a tensor's elements as boxes, which is what a checkpoint's shards can be."""

from collections.abc import Iterator, Sequence
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size in each dimension


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Elements start to end of a row-major tensor, cut into boxes, in their order."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:
        yield from _in_row(shape, last, start, end)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, end)


def _in_row(shape: Sequence[int], number: int, start: int, end: int) -> Iterator[Box]:
    before = number * prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, end - before):
        yield (number, *offset), (1, *size)
