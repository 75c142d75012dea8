"""What weights travel in: Hugging Face tensors that lie end to end in one piece of memory."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bucket:
    """`tensors` are views of `flat` [elements], without gaps, in their order.

    The memory belongs to whoever made the bucket and is written again for the next one: a reader
    copies what it keeps before it asks for that.
    """

    tensors: Mapping[str, Tensor]
    flat: Tensor

    @classmethod
    def over(cls, memory: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> "Bucket":
        """The start of `memory` [elements] seen as tensors of these shapes."""
        sizes = [math.prod(shape) for shape in shapes.values()]
        flat = memory[: sum(sizes)]
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        return cls({name: part.view(shape) for (name, shape), part in parts}, flat)


def named_tensors(buckets: Iterable[Bucket]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) one by one; each is good until the next is asked for."""
    for bucket in buckets:
        yield from bucket.tensors.items()


_PRIME = 1_000_003
_CHUNK = 2**22


def checksum(values: Tensor) -> int:
    """A number that changes with any byte, and with their order: 64 bits, on any device.

    sum_i w_i (1 + (i mod p)) modulo 2^64 over 32-bit words w_i (the last one filled with zeros),
    p = 1,000,003. A change of one word always shows: a factor below 2^20 cannot hide 32 bits.
    """
    return checksums([values])[0]


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Of each; the device is asked once, for all of them."""
    sums = [_sum(values) for values in tensors]
    return [total % 2**64 for total in torch.stack(sums).tolist()] if sums else []


def _sum(values: Tensor) -> Tensor:
    """Modulo 2^64, as int64 is."""
    raw = values.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 4:  # bytes that no word can start at, behind an odd bfloat16 tensor
        raw = raw.clone()
    whole = raw.numel() // 4 * 4
    words, rest = raw[:whole].view(torch.int32), raw[whole:].long()
    total = (rest << 8 * torch.arange(len(rest), device=raw.device)).sum()
    total *= words.numel() % _PRIME + 1
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        place = torch.arange(start, start + part.numel(), device=raw.device) % _PRIME
        total += (part * (place + 1)).sum()
    return total
