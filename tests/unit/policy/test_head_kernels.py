"""The head's Triton kernels, interpreted, against dense float64; what they read and write."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megasd.losses.divergence import DivergenceKind
from megasd.policy.head import blocks
from megasd.policy.head.divergence import full_divergence
from megasd.policy.head.head import TopIds, vocabulary_head
from tests.unit.policy import test_head_divergence
from tests.unit.policy.interpreter import FOLDER, NEEDS_TRITON, interpreted_kernels
from tests.unit.policy.test_head import VOCAB, Problem

pytestmark = NEEDS_TRITON

KINDS = get_args(DivergenceKind)
ROUNDED = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-8, 1e-5)}  # gradients: rtol, atol


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted_kernels() as module:
        yield module


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    """Tiles of 16, 16 and 5 rows: the last one leaves room in the kernels' power of two."""
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 16)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("of", ["logprobs", "entropy", "all"])
def test_values_and_gradients_are_those_of_dense_float64(dtype: torch.dtype, of: str) -> None:
    problem = Problem(dtype, tokens=9)
    expected = problem.dense(0.6, ids=problem.ids)
    output = problem.fused(temperature=0.6, chunk_tokens=4, ids=problem.ids)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    rtol, atol = ROUNDED[dtype]
    gradients = problem.gradients(output, of=of)
    for gradient, reference in zip(gradients, problem.gradients(expected, of=of), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, reference, rtol=rtol, atol=atol)
    assert not gradients[1][VOCAB:].any()


@pytest.mark.parametrize("top_k", [1, 6, VOCAB])
def test_the_most_likely_ids_are_those_of_a_stable_sort(top_k: int) -> None:
    problem = Problem(torch.float32, tokens=3)
    with torch.no_grad():  # small whole numbers: exact products, many ties
        problem.hidden.copy_(problem.hidden.round())
        problem.weight.copy_(problem.weight.round())
        logits, ids = (problem.hidden @ problem.weight[:VOCAB].T).sort(
            dim=1, descending=True, stable=True
        )
        assert (logits[:, :-1] == logits[:, 1:]).any(dim=1).all()
        top = problem.fused(top_k=top_k, chunk_tokens=2).top
    assert isinstance(top, TopIds)
    assert torch.equal(top.ids, ids[:, :top_k])
    torch.testing.assert_close(top.logprobs, logits.log_softmax(dim=1)[:, :top_k])


def test_the_same_id_has_the_same_log_prob_to_the_bit_wherever_it_is_asked_for() -> None:
    problem = Problem(torch.float32, tokens=5)
    top = problem.fused(top_k=4).top
    assert top is not None
    output = problem.fused(ids=torch.cat((problem.targets[:, None], top.ids), dim=1))
    assert output.at_ids is not None
    assert torch.equal(output.at_ids[:, 0], output.logprobs)
    assert torch.equal(output.at_ids[:, 1:], top.logprobs)


def test_logits_of_ten_thousand_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 1)
    hidden = torch.tensor([[100.0], [100.0], [100.0], [-100.0]], requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0], [0.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    logprobs, entropy, *_ = vocabulary_head(hidden, weight, targets, vocab_size=3)
    assert logprobs.tolist() == [0.0, -20_000.0, -10_000.0, -20_000.0]
    assert entropy.tolist() == [0.0, 0.0, 0.0, 0.0]
    torch.autograd.backward([logprobs, entropy], [torch.ones(4), torch.ones(4)])
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -200.0, -100.0, 200.0]
    assert weight.grad.flatten().tolist() == [-300.0, 200.0, 100.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "clip"), [(torch.float32, None), (torch.bfloat16, 0.05)])
def test_divergences_and_their_gradients_are_those_of_dense_float64(
    kind: DivergenceKind, dtype: torch.dtype, clip: float | None
) -> None:
    problem = test_head_divergence.Problem(dtype, tokens=5)
    settings = {"alpha": 0.3, "temperature": 0.6, "entry_clip": clip}
    value, expected = (
        problem.fused(kind, chunk_tokens=3, **settings),
        problem.dense(kind, **settings),
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    rtol, atol = ROUNDED[dtype]
    pairs = zip(problem.gradients(value), problem.gradients(expected), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=rtol, atol=2 * atol)


def test_no_tokens_give_empty_outputs_and_zero_gradients() -> None:
    problem = Problem(torch.float32, tokens=0)
    output = problem.fused(ids=problem.ids, top_k=3)
    assert output.top is not None
    assert output.top.ids.shape == (0, 3)
    assert not any(gradient.any() for gradient in problem.gradients(output, of="all"))


class Counter(TorchDispatchMode):
    """What a run costs: launches, and the bytes read or written of tensors as large as a block.

    A product reads its operands and writes its result, each once. Of Triton's kernels the
    interpreter counts what they really load and store, the few numbers per token too.
    """

    _NO_LAUNCH = ("view", "slice", "select", "transpose", "expand", "unsqueeze", "t.default")
    _NO_LAUNCH += ("split", "unbind", "alias", "detach", "permute", "empty", "squeeze", "unsafe")

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.launches = self.bytes = 0
        self._block_size = block_size
        self._is_inside = False  # of a launch: how a CPU does it is of no interest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._is_inside and not any(name in str(func) for name in self._NO_LAUNCH):
            self.launches += 1
            self._see(args, kwargs, result)
        return result

    def _see(self, *tensors: Any) -> None:
        found = {x.data_ptr(): x for x in tree_leaves(tensors) if isinstance(x, Tensor)}
        blocks_seen = [x for x in found.values() if x.numel() >= self._block_size]
        self.bytes += sum(x.numel() * x.element_size() for x in blocks_seen)

    def _launch(self, function: Any, *args: Any, **kwargs: Any) -> None:
        self.launches += 1
        self._is_inside = True
        function(*args, **kwargs)
        self._is_inside = False

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counts Triton's launches and accesses, and products of bfloat16 as CUDA takes them."""
        from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store = builder.create_masked_load, builder.create_masked_store
        execute = executor.__call__

        def access(pointers: Any, mask: Any) -> None:
            self.bytes += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

        def counted_load(builder: Any, pointers: Any, mask: Any, *args: Any) -> Any:
            access(pointers, mask)
            return load(builder, pointers, mask, *args)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            access(pointers, mask)
            return store(builder, pointers, value, mask, *args)

        def product(out: Tensor, left: Tensor, right: Tensor, **factors: float) -> None:
            self._see(out, left, right)
            self._launch(_product, out, left, right, **factors)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        monkeypatch.setattr(executor, "__call__", lambda *a, **k: self._launch(execute, *a, **k))
        monkeypatch.setattr(blocks, "_operand_dtype", lambda hidden, _: hidden.dtype)
        monkeypatch.setattr(blocks, "_add_product", product)


def _product(out: Tensor, left: Tensor, right: Tensor, **factors: float) -> None:
    torch.addmm(out, left.to(out.dtype), right.to(out.dtype), **factors, out=out)


ROWS, CHUNK = 1024, 4


class Cost(NamedTuple):
    launches: float  # per block
    bytes: float  # per logit


def measure(
    monkeypatch: pytest.MonkeyPatch, values_of: Callable[[Tensor, Tensor], list[Tensor]]
) -> tuple[Cost, Cost]:
    """Of forward and backward, a block: what one chunk more of two tiles adds, halved."""
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", ROWS)
    counter = Counter(CHUNK * ROWS)
    counter.patch(monkeypatch)
    counts = []
    for tokens in (CHUNK, 2 * CHUNK):
        random = torch.Generator().manual_seed(1)
        hidden, weight = (
            torch.randn(rows, 2, generator=random).bfloat16().requires_grad_()
            for rows in (tokens, 2 * ROWS)
        )
        with counter:
            values = values_of(hidden, weight)
            counts.append((counter.launches, counter.bytes))
            torch.autograd.backward(values, [torch.ones_like(value) for value in values])
            counts.append((counter.launches, counter.bytes))
        counter.launches = counter.bytes = 0
    counted = torch.tensor(counts, dtype=torch.float64).view(2, 2, 2)  # run, forward/both, what
    forward, both = (counted[1] - counted[0]) / 2 / torch.tensor([1, CHUNK * ROWS])
    return Cost(*forward.tolist()), Cost(*(both - forward).tolist())


@pytest.mark.parametrize("top_k", [0, 3])
def test_of_each_logit_8_bytes_move_forward_and_14_backward_in_two_and_four_launches(
    monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    def values_of(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        ids = torch.zeros(len(hidden), 3, dtype=torch.int64)
        settings = {"ids": ids, "top_k": top_k, "vocab_size": 2 * ROWS, "chunk_tokens": CHUNK}
        output = vocabulary_head(hidden, weight, ids[:, 0], **settings)
        return [x for x in output[:3] if x is not None]

    forward, backward = measure(monkeypatch, values_of)
    assert forward.launches == 2  # product, statistics
    assert 8 <= forward.bytes < 8.2  # float32 logits written and read
    assert backward.launches == 4  # product, gradient, two products
    assert 14 <= backward.bytes < 14.2  # logits written and read; bfloat16 written, read twice


def test_a_full_divergence_takes_four_products_and_three_passes_forward_four_and_one_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def values_of(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        teacher = hidden.detach() + 1, weight.detach() + 1
        settings: Any = {"vocab_size": 2 * ROWS, "chunk_tokens": CHUNK}
        return [full_divergence(hidden, weight, *teacher, kind="jsd", **settings)]

    forward, backward = measure(monkeypatch, values_of)
    assert forward.launches == 7
    assert 32 <= forward.bytes < 32.3  # logits of both sides twice written, twice read
    assert backward.launches == 5
    assert 22 <= backward.bytes < 22.2  # both once more; bfloat16 written, read twice


def test_the_kernels_compile_for_an_h100_and_hold_their_rows_in_registers() -> None:
    command = [sys.executable, "-m", "tests.unit.policy.compile_kernels", str(FOLDER)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=root
    )
    spilled = json.loads(done.stdout)
    assert len(spilled) == 5
    assert set(spilled.values()) == {0}
