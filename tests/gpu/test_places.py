"""What is counted and drawn by place is the same on a GPU as on a CPU, to the bit."""

import pytest
import torch

from megasd.losses.median import add_to_counts, median
from megasd.policy.uniforms import uniforms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_tokens_draws_do_not_depend_on_the_device() -> None:
    tokens = torch.tensor([0, 7, 2**40, 33_554_431])
    there = uniforms((3, 1), tokens.cuda(), 64)
    assert there.is_cuda
    assert torch.equal(there.cpu(), uniforms((3, 1), tokens, 64))


def test_counts_and_medians_do_not_depend_on_the_device() -> None:
    entropies = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).square()
    found = []
    for device in ("cpu", "cuda"):
        nothing = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        values, counts = add_to_counts(*nothing, entropies.to(device))
        found.append((values.tolist(), counts.tolist(), median(values, counts)))
    assert found[0] == found[1]
