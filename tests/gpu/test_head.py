"""The fused head on a GPU: its Triton kernels, bfloat16 products with float32 sums, its memory."""

from typing import Any, get_args

import pytest
import torch

from megasd.losses.divergence import DivergenceKind, divergence
from megasd.policy.head import blocks
from megasd.policy.head.divergence import full_divergence
from megasd.policy.head.head import sample_ids, vocabulary_head

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
    for value, reference in zip(output[:2], expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=0, atol=value_tolerance)
    inputs = (hidden, weight)
    ours = torch.autograd.grad(list(output[:2]), inputs, list(upstream))
    dense = torch.autograd.grad(list(expected), inputs, list(upstream.double()))
    _assert_close_in_norm(ours, dense, gradient_tolerance)


def _assert_close_in_norm(
    gradients: tuple[torch.Tensor, ...], references: tuple[torch.Tensor, ...], tolerance: float
) -> None:
    for gradient, reference in zip(gradients, references, strict=True):
        error = (gradient.double() - reference.double()).norm() / reference.double().norm()
        assert error < tolerance


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "gradient_tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)


@PRECISIONS
def test_log_probs_at_ids_and_their_gradients_are_the_dense_ones(
    dtype: torch.dtype, gradient_tolerance: float
) -> None:
    hidden, weight, targets, _ = _inputs(dtype)
    random = torch.Generator("cuda").manual_seed(6)
    ids = torch.randint(VOCAB, (TOKENS, 20), device="cuda", generator=random)
    ids[:, 1] = ids[:, 0]  # a duplicate
    upstream = torch.randn(TOKENS, 20, device="cuda", generator=random)
    everything = (hidden.double() @ weight.double()[:VOCAB].T / 0.8).log_softmax(dim=-1)
    expected = everything.gather(1, ids)
    at_ids = vocabulary_head(
        hidden, weight, targets, ids=ids, vocab_size=VOCAB, temperature=0.8
    ).at_ids
    assert at_ids is not None
    torch.testing.assert_close(at_ids.double(), expected, rtol=0, atol=1e-4)
    inputs = (hidden, weight)
    ours = torch.autograd.grad(at_ids, inputs, upstream)
    dense = torch.autograd.grad(expected, inputs, upstream.double())
    _assert_close_in_norm(ours, dense, gradient_tolerance)


@torch.no_grad()
def test_top_ids_are_those_of_a_stable_sort_where_logits_tie() -> None:
    hidden, weight, targets, _ = _inputs(torch.bfloat16)
    hidden, weight = hidden.round(), (4 * weight).round()  # whole numbers: exact products
    logits = (hidden.float() @ weight.float()[:VOCAB].T).round()
    logits, ids = logits.sort(dim=1, descending=True, stable=True)
    assert (logits[:, :99] == logits[:, 1:100]).any()
    top = vocabulary_head(hidden, weight, targets, top_k=100, vocab_size=VOCAB).top
    assert top is not None
    assert torch.equal(top.ids, ids[:, :100])
    expected = logits.double().log_softmax(dim=1)[:, :100]
    torch.testing.assert_close(top.logprobs.double(), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_draws_invert_the_dense_cumulative_distribution() -> None:
    hidden, weight, _, _ = _inputs(torch.bfloat16)
    uniforms = torch.rand(TOKENS, 16, device="cuda")
    mass = (hidden.double() @ weight.double()[:VOCAB].T).softmax(dim=1).cumsum(dim=1)
    ids = sample_ids(hidden, weight, uniforms, vocab_size=VOCAB)
    # float32 logits move a boundary by about 1e-5: a draw that near may fall to either side
    above = mass.gather(1, ids) + 1e-4 - uniforms
    below = uniforms + 1e-4 - mass.gather(1, (ids - 1).clamp(min=0)).where(ids > 0, 0.0)
    assert (above > 0).all()
    assert (below > 0).all()
    exact = torch.searchsorted(mass, uniforms.double(), right=True)
    assert (ids == exact).double().mean() > 0.95


def _teacher(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator("cuda").manual_seed(15)
    hidden = torch.randn(TOKENS, 2 * HIDDEN, device="cuda", generator=random)
    weight = torch.randn(VOCAB + 96, 2 * HIDDEN, device="cuda", generator=random)
    return hidden.to(dtype), (weight * (2 * HIDDEN) ** -0.5).to(dtype)


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
@PRECISIONS
def test_the_full_divergence_and_its_gradients_are_the_dense_ones(
    kind: DivergenceKind, dtype: torch.dtype, gradient_tolerance: float
) -> None:
    hidden, weight, _, (upstream, _) = _inputs(dtype)
    teacher = _teacher(dtype)
    student_logprobs, teacher_logprobs = (
        (states.double() @ rows.double()[:VOCAB].T / 0.8).log_softmax(dim=-1)
        for states, rows in ((hidden, weight), teacher)
    )
    expected = divergence(
        student_logprobs, teacher_logprobs, kind=kind, rest="tail", vocab_size=VOCAB
    )
    value = full_divergence(hidden, weight, *teacher, kind=kind, vocab_size=VOCAB, temperature=0.8)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    inputs = (hidden, weight)
    ours = torch.autograd.grad(value, inputs, upstream)
    dense = torch.autograd.grad(expected, inputs, upstream.double())
    _assert_close_in_norm(ours, dense, gradient_tolerance)


def _everything(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[Any]:
    """Of one micro-batch: head with ids and top ids, divergence, and the gradients of both."""
    settings: Any = {"vocab_size": VOCAB, "temperature": 0.8, "chunk_tokens": 1024}
    ids = (targets[:, None] + torch.arange(8, device="cuda") // 2) % VOCAB  # each twice
    output = vocabulary_head(hidden, weight, targets, ids=ids, top_k=50, **settings)
    value = full_divergence(
        hidden, weight, *_teacher(hidden.dtype), kind="jsd", entry_clip=0.05, **settings
    )
    assert output.at_ids is not None
    assert output.top is not None
    loss = (output.logprobs + output.entropy + output.at_ids.sum(dim=1) + value).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return [output.logprobs, output.entropy, output.at_ids, *output.top, value, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_give_what_torchs_operations_give(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks.find_kernels("cuda") is not None
    hidden, weight, targets, _ = _inputs(dtype)
    ours = _everything(hidden, weight, targets)
    monkeypatch.setattr(blocks, "find_kernels", lambda _: None)
    *values, of_hidden, of_weight = _everything(hidden, weight, targets)
    for one, other in zip(ours, values, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    _assert_close_in_norm((ours[-2], ours[-1]), (of_hidden, of_weight), 1e-2)


def test_nothing_waits_for_the_device() -> None:
    hidden, weight, targets, _ = _inputs(torch.bfloat16)
    _everything(hidden, weight, targets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _everything(hidden, weight, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_main_grad_sums_the_weights_gradients_in_float32() -> None:
    hidden, weight, targets, upstream = _inputs(torch.bfloat16)
    (alone,) = torch.autograd.grad(
        list(vocabulary_head(hidden, weight, targets, vocab_size=VOCAB)[:2]),
        weight,
        list(upstream),
    )
    buffered: Any = weight
    buffered.main_grad = torch.ones(weight.shape, device="cuda")
    buffered.grad_added_to_main_grad = False
    output = vocabulary_head(hidden, weight, targets, vocab_size=VOCAB)
    torch.autograd.backward(list(output[:2]), list(upstream))
    assert buffered.grad_added_to_main_grad
    added = buffered.main_grad - 1
    _assert_close_in_norm((added,), (alone,), 5e-3)
    assert not torch.equal(added, added.bfloat16().float())  # it was not rounded


def test_peak_memory_is_a_block_its_gradient_and_the_gradients() -> None:
    hidden, weight, targets, upstream = _inputs(torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = vocabulary_head(hidden, weight, targets, vocab_size=VOCAB, chunk_tokens=512)
    torch.autograd.backward(list(output[:2]), list(upstream))
    extra = torch.cuda.max_memory_allocated() - before
    block = (4 + 2) * 512 * 8192  # logits, their gradient in bfloat16
    sums = 4 * (8192 + TOKENS) * HIDDEN
    gradients = 2 * (weight.numel() + hidden.numel())
    workspace_and_statistics = 2**26
    assert extra < block + sums + gradients + workspace_and_statistics


def test_peak_memory_of_the_full_divergence_is_two_blocks_their_gradient_and_the_gradients() -> (
    None
):
    hidden, weight, _, (upstream, _) = _inputs(torch.bfloat16)
    teacher = _teacher(torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = full_divergence(
        hidden, weight, *teacher, kind="jsd", vocab_size=VOCAB, chunk_tokens=512
    )
    value.backward(upstream)
    extra = torch.cuda.max_memory_allocated() - before
    block = (4 + 4 + 2) * 512 * 8192  # logits of both, the gradient in bfloat16
    sums = 4 * (8192 + TOKENS) * HIDDEN
    gradients = 2 * (weight.numel() + hidden.numel())
    workspace_and_statistics = 2**26
    assert extra < block + sums + gradients + workspace_and_statistics
