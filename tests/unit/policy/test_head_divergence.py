"""The divergence over the whole vocabulary against dense float64 logits and autograd."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megasd.losses.divergence import DivergenceKind
from megasd.policy.head import blocks
from megasd.policy.head.divergence import full_divergence
from tests.unit.losses.test_divergence import brute_force
from tests.unit.policy.test_head import Recorder

KINDS = get_args(DivergenceKind)
TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, PADDING = 20, 6, 9, 37, 4


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 16)


class Problem:
    """Student and teacher with padding rows of NaN, and the gradient that arrives."""

    def __init__(self, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> None:
        random = torch.Generator().manual_seed(17)
        operands = []
        for size in (HIDDEN, TEACHER_HIDDEN):
            weight = torch.randn(VOCAB + PADDING, size, generator=random)
            weight[VOCAB:] = torch.nan
            operands += [torch.randn(tokens, size, generator=random), weight]
        self.operands = [operand.to(dtype).requires_grad_() for operand in operands]
        self.hidden, self.weight, self.teacher_hidden, self.teacher_weight = self.operands
        self.upstream = torch.randn(tokens, generator=random)

    def fused(self, kind: DivergenceKind, **settings: Any) -> Tensor:
        return full_divergence(*self.operands, kind=kind, vocab_size=VOCAB, **settings)

    def dense(
        self,
        kind: DivergenceKind,
        *,
        alpha: float = 0.5,
        entry_clip: float | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        student, teacher = (
            (states.double() @ rows.double()[:VOCAB].T / temperature).log_softmax(dim=-1)
            for states, rows in (self.operands[:2], self.operands[2:])
        )
        entries = brute_force(kind, student, teacher.detach(), alpha)
        return entries.clamp(max=math.inf if entry_clip is None else entry_clip).sum(dim=1)

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, (self.hidden, self.weight), self.upstream.to(value.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_values_and_gradients_are_those_of_the_dense_divergence(
    kind: DivergenceKind, chunk_tokens: int, temperature: float, entry_clip: float | None
) -> None:
    problem = Problem()
    settings = {"alpha": 0.3, "temperature": temperature, "entry_clip": entry_clip}
    expected = problem.dense(kind, **settings)
    value = problem.fused(kind, chunk_tokens=chunk_tokens, **settings)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        problem.gradients(value), problem.gradients(expected), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_rows", [5, 1000])
@pytest.mark.parametrize("chunk_tokens", [3, 1000])
def test_the_cut_into_blocks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: DivergenceKind, block_rows: int, chunk_tokens: int
) -> None:
    problem = Problem()
    expected = problem.fused(kind)
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", block_rows)
    value = problem.fused(kind, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        problem.gradients(value), problem.gradients(expected), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_lower_precision_is_computed_in_float32_and_its_gradients_are_rounded_once(
    kind: DivergenceKind, dtype: torch.dtype, tolerance: float
) -> None:
    problem = Problem(dtype)
    value, expected = problem.fused(kind, chunk_tokens=7), problem.dense(kind)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(
        problem.gradients(value), problem.gradients(expected), strict=True
    ):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_equals_the_student_pulls_nowhere(kind: DivergenceKind) -> None:
    problem = Problem(torch.float32)
    teacher = problem.hidden.detach(), problem.weight.detach()
    value = full_divergence(problem.hidden, problem.weight, *teacher, kind=kind, vocab_size=VOCAB)
    assert value.abs().max() < 1e-6
    for gradient in problem.gradients(value):
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_and_padding_rows_get_no_gradient(kind: DivergenceKind) -> None:
    problem = Problem()
    problem.fused(kind).sum().backward()
    assert problem.teacher_hidden.grad is None
    assert problem.teacher_weight.grad is None
    assert problem.weight.grad is not None
    assert problem.weight.grad[:VOCAB].any()
    assert not problem.weight.grad[VOCAB:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_ten_thousand_stay_exact(kind: DivergenceKind) -> None:
    # S = (1, 0), T = (0, 1), ten thousand nats apart; M is half of each
    states = torch.tensor([[100.0]])
    hidden = states.clone().requires_grad_()
    weight, teacher_weight = torch.tensor([[100.0], [0.0]]), torch.tensor([[0.0], [100.0]])
    value = full_divergence(hidden, weight, states, teacher_weight, kind=kind, vocab_size=2)
    value.sum().backward()
    expected = 0.6931472 if kind == "jsd" else 10_000.0
    assert value.item() == pytest.approx(expected)
    assert hidden.grad is not None
    # d logits: forward_kl S - T = (1, -1); the others are flat at a certain student
    assert hidden.grad.item() == (100.0 if kind == "forward_kl" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_full_logits_never_exist_and_five_numbers_per_token_wait(kind: DivergenceKind) -> None:
    problem = Problem(torch.float32, tokens=400)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with Recorder() as fused, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        problem.gradients(problem.fused(kind, chunk_tokens=8))
    two_statistics = 2 * 3 * 400
    assert fused.largest <= max(two_statistics, problem.teacher_hidden.numel())
    assert fused.largest < 400 * VOCAB / 4
    beyond_inputs = [x for x in kept if not any(x is y for y in problem.operands)]
    assert sum(x.numel() for x in beyond_inputs) == 5 * 400


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(tokens: int) -> None:
    problem = Problem(tokens=tokens)
    value = problem.fused("jsd")
    assert value.shape == (tokens,)
    torch.testing.assert_close(value, problem.dense("jsd"))
    torch.testing.assert_close(
        problem.gradients(value), problem.gradients(problem.dense("jsd")), rtol=1e-9, atol=1e-12
    )


def test_operands_that_cannot_work_are_named() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="alpha of jsd is 1"):
        problem.fused("jsd", alpha=1.0)
    with pytest.raises(ValueError, match="20 tokens and 41 vocabulary rows, the teacher 19 and 41"):
        full_divergence(
            problem.hidden,
            problem.weight,
            problem.teacher_hidden[1:],
            problem.teacher_weight,
            kind="jsd",
            vocab_size=VOCAB,
        )
    with pytest.raises(RuntimeError, match="has no second derivative; drop create_graph"):
        torch.autograd.grad(problem.fused("jsd").sum(), problem.hidden, create_graph=True)
