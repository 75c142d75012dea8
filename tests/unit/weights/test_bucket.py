"""Tensors that travel together, and the number that proves that they arrived."""

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megasd.weights.bucket import Bucket, checksum, checksums, named_tensors


def test_a_bucket_sees_its_memory_as_tensors_end_to_end() -> None:
    memory = torch.arange(20.0)
    bucket = Bucket.over(memory, {"a": (2, 3), "b": (), "c": (5,)})
    assert torch.equal(bucket.tensors["a"], torch.arange(6.0).view(2, 3))
    assert bucket.tensors["b"] == 6.0
    assert torch.equal(bucket.tensors["c"], torch.arange(7.0, 12.0))
    assert torch.equal(bucket.flat, torch.arange(12.0))
    memory.zero_()
    assert all(not tensor.any() for _, tensor in named_tensors([bucket]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("elements", [1, 3, 1001])
def test_a_checksum_changes_with_every_byte_and_with_the_order_of_words(
    dtype: torch.dtype, elements: int
) -> None:
    generator = torch.Generator().manual_seed(elements)
    values = torch.randint(0, 256, (elements * dtype.itemsize,), generator=generator).byte()
    before = checksum(values.view(dtype))
    assert before == checksum(values.clone().view(dtype))
    draw = random.Random(0)
    places = range(len(values)) if len(values) < 20 else draw.sample(range(len(values)), 50)
    for place in places:
        for bit in range(8):
            values[place] ^= 1 << bit
            assert checksum(values.view(dtype)) != before
            values[place] ^= 1 << bit
    if len(values) > 8:
        assert checksum(torch.cat([values[4:8], values[:4], values[8:]])) != before


def test_a_checksum_is_the_sum_it_says_over_many_chunks() -> None:
    words = torch.randint(-(2**31), 2**31, (2**22 + 5,), dtype=torch.int64).int()
    expected = sum(int(w) * (i % 1_000_003 + 1) for i, w in enumerate(words.tolist()))
    assert checksum(words) == expected % 2**64


class Asked(TorchDispatchMode):
    """Counts how often the host waits for one number."""

    times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_the_checksums_of_many_tensors_are_asked_for_at_once() -> None:
    tensors = [torch.randn(n).bfloat16() for n in (1, 2, 3, 4, 1001)]
    with Asked() as asked:
        found = checksums(tensors)
    assert found == [checksum(tensor) for tensor in tensors]
    assert asked.times == 0
    assert checksums([]) == []
