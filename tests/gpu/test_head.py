"""The fused head on a GPU: bfloat16 products with float32 sums, and its memory."""

import pytest
import torch

from megasd.policy.head import vocabulary_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, HIDDEN, VOCAB = 3000, 256, 20_000  # several chunks and tiles, the last ones partial


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator("cuda").manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", generator=random)
    weight = torch.randn(VOCAB + 96, HIDDEN, device="cuda", generator=random) * HIDDEN**-0.5
    targets = torch.randint(VOCAB, (TOKENS,), device="cuda", generator=random)
    upstream = torch.randn(2, TOKENS, device="cuda", generator=random)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
        upstream,
    )


@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 1e-4, 1e-2)],
)
def test_values_and_gradients_are_those_of_dense_log_softmax(
    dtype: torch.dtype, value_tolerance: float, gradient_tolerance: float
) -> None:
    hidden, weight, targets, upstream = _inputs(dtype)
    logits = hidden.double() @ weight.double()[:VOCAB].T / 0.8
    everything = torch.log_softmax(logits, dim=-1)
    expected = (
        everything.gather(1, targets[:, None]).squeeze(1),
        -(everything.exp() * everything).sum(dim=-1),
    )
    output = vocabulary_head(hidden, weight, targets, vocab_size=VOCAB, temperature=0.8)
    for value, reference in zip(output, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=0, atol=value_tolerance)
    inputs = (hidden, weight)
    ours = torch.autograd.grad(list(output), inputs, list(upstream))
    dense = torch.autograd.grad(list(expected), inputs, list(upstream.double()))
    for gradient, reference in zip(ours, dense, strict=True):
        error = (gradient.double() - reference.double()).norm() / reference.double().norm()
        assert error < gradient_tolerance


def test_peak_memory_is_two_blocks_and_the_gradients() -> None:
    hidden, weight, targets, upstream = _inputs(torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = vocabulary_head(hidden, weight, targets, vocab_size=VOCAB, chunk_tokens=512)
    torch.autograd.backward(list(output), list(upstream))
    extra = torch.cuda.max_memory_allocated() - before
    blocks = (4 + 4 + 2) * 512 * 8192  # logits, exponentials, the gradient in bfloat16
    sums = 4 * (8192 + TOKENS) * HIDDEN
    gradients = 2 * (weight.numel() + hidden.numel())
    workspace_and_statistics = 2**26
    assert extra < blocks + sums + gradients + workspace_and_statistics
