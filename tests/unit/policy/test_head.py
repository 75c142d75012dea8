"""The fused head against dense float64 log-softmax; the full logits never exist."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megasd.policy.config import ModelConfig
from megasd.policy.head import blocks
from megasd.policy.head.divergence import full_divergence
from megasd.policy.head.head import HeadOutput, sample_ids, vocabulary_head

TOKENS, HIDDEN, VOCAB, PADDING = 20, 6, 37, 4


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards still cross tile borders."""
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 16)


class Problem:
    """Inputs with padding rows of NaN, and gradients that arrive at the two outputs."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, tokens: int = TOKENS, seed: int = 7
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, HIDDEN, generator=random).to(dtype).requires_grad_()
        weight = torch.randn(VOCAB + PADDING, HIDDEN, generator=random)
        weight[VOCAB:] = torch.nan
        self.weight = weight.to(dtype).requires_grad_()
        self.targets = torch.randint(VOCAB, (tokens,), generator=random)
        self.upstream = torch.randn(2, tokens, generator=random)
        self.ids = torch.randint(VOCAB, (tokens, 5), generator=random)
        self.ids[:, 1] = self.targets
        self.ids[::2, 3] = self.ids[::2, 2]  # duplicates
        self.upstream_at_ids = torch.randn(tokens, 5, generator=random)

    def fused(self, **settings: Any) -> HeadOutput:
        return vocabulary_head(self.hidden, self.weight, self.targets, vocab_size=VOCAB, **settings)

    def dense_logprobs(self, temperature: float = 1.0) -> Tensor:
        logits = self.hidden.double() @ self.weight.double()[:VOCAB].T / temperature
        return torch.log_softmax(logits, dim=-1)

    def dense(self, temperature: float = 1.0, *, ids: Tensor | None = None) -> HeadOutput:
        everything = self.dense_logprobs(temperature)
        entropy = -(everything.exp() * everything).sum(dim=-1)
        at_ids = None if ids is None else everything.gather(1, ids)
        return HeadOutput(everything.gather(1, self.targets[:, None]).squeeze(1), entropy, at_ids)

    def gradients(self, output: HeadOutput, *, of: str = "both") -> tuple[Tensor, Tensor]:
        named = {
            "logprobs": (output.logprobs, self.upstream[0]),
            "entropy": (output.entropy, self.upstream[1]),
            "at_ids": (output.at_ids, self.upstream_at_ids),
        }
        chosen = {"both": ["logprobs", "entropy"], "all": list(named)}.get(of, [of])
        losses = [named[name] for name in chosen]
        loss = sum((values * weights).sum() for values, weights in losses)
        assert isinstance(loss, Tensor)
        of_hidden, of_weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        return of_hidden, of_weight


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("of", ["logprobs", "entropy", "both"])
def test_values_and_gradients_are_those_of_dense_log_softmax(
    chunk_tokens: int, temperature: float, of: str
) -> None:
    problem = Problem()
    expected = problem.dense(temperature)
    output = problem.fused(temperature=temperature, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        problem.gradients(output, of=of),
        problem.gradients(expected, of=of),
        rtol=1e-11,
        atol=1e-12,
    )


def test_padding_rows_get_gradient_zero() -> None:
    problem = Problem()
    _, weight_gradient = problem.gradients(problem.fused())
    assert not weight_gradient[VOCAB:].any()


def test_float32_differs_from_float64_by_rounding_only() -> None:
    problem = Problem(torch.float32)
    output, expected = problem.fused(chunk_tokens=7), problem.dense()
    assert output.logprobs.dtype == output.entropy.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(
        problem.gradients(output), problem.gradients(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_bfloat16_inputs_are_summed_in_float32_and_rounded_once(chunk_tokens: int) -> None:
    rounded = Problem(torch.bfloat16)
    exact = Problem(torch.float32)
    exact.hidden = rounded.hidden.detach().float().requires_grad_()
    exact.weight = rounded.weight.detach().float().requires_grad_()
    output, expected = rounded.fused(chunk_tokens=chunk_tokens), exact.fused()
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    for gradient, reference in zip(
        rounded.gradients(output), exact.gradients(expected), strict=True
    ):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), reference, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("block_rows", [5, 16, 1000])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_the_cut_into_blocks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, chunk_tokens: int
) -> None:
    problem = Problem(torch.float32)
    expected = problem.fused()
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", block_rows)
    output = problem.fused(chunk_tokens=chunk_tokens)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        problem.gradients(output), problem.gradients(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("block_rows", [1, 3])
def test_logits_of_ten_thousand_stay_exact(
    monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", block_rows)
    hidden = torch.tensor([[100.0], [100.0], [100.0], [-100.0]], requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0], [0.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    logprobs, entropy, *_ = vocabulary_head(hidden, weight, targets, vocab_size=3)
    assert logprobs.tolist() == [0.0, -20_000.0, -10_000.0, -20_000.0]
    assert entropy.tolist() == [0.0, 0.0, 0.0, 0.0]
    torch.autograd.backward([logprobs, entropy], [torch.ones(4), torch.ones(4)])
    # d logits: [0, 0, 0], [-1, 1, 0], [-1, 0, 1], [1, -1, 0]
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -200.0, -100.0, 200.0]
    assert weight.grad.flatten().tolist() == [-300.0, 200.0, 100.0]


def test_no_tokens_give_empty_outputs_and_zero_gradients() -> None:
    problem = Problem(tokens=0)
    output = problem.fused(ids=problem.ids, top_k=3)
    assert output.logprobs.shape == output.entropy.shape == (0,)
    assert output.at_ids is not None
    assert output.top is not None
    assert output.at_ids.shape == (0, 5)
    assert output.top.ids.shape == output.top.logprobs.shape == (0, 3)
    hidden_gradient, weight_gradient = problem.gradients(output, of="all")
    assert hidden_gradient.shape == (0, HIDDEN)
    assert weight_gradient.shape == problem.weight.shape
    assert not weight_gradient.any()


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("of", ["at_ids", "all"])
def test_log_probs_at_ids_and_their_gradients_are_the_dense_ones(
    chunk_tokens: int, temperature: float, of: str
) -> None:
    problem = Problem()
    expected = problem.dense(temperature, ids=problem.ids)
    output = problem.fused(temperature=temperature, chunk_tokens=chunk_tokens, ids=problem.ids)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        problem.gradients(output, of=of),
        problem.gradients(expected, of=of),
        rtol=1e-11,
        atol=1e-12,
    )


def test_bfloat16_gradients_through_int32_ids_are_rounded_once() -> None:
    problem = Problem(torch.bfloat16)
    ours = problem.gradients(problem.fused(ids=problem.ids.int()), of="all")
    dense = problem.gradients(problem.dense(ids=problem.ids), of="all")
    for gradient, reference in zip(ours, dense, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, reference, rtol=2**-7, atol=1e-3)


def test_the_same_id_has_the_same_log_prob_to_the_bit_wherever_it_is_asked_for() -> None:
    problem = Problem(torch.float32)
    top = problem.fused(top_k=5).top
    assert top is not None
    ids = torch.cat((problem.targets[:, None], top.ids), dim=1)
    output = problem.fused(ids=ids, top_k=5)
    assert output.at_ids is not None
    assert output.top is not None
    assert torch.equal(output.at_ids[:, 0], output.logprobs)
    assert torch.equal(output.at_ids[:, 1:], output.top.logprobs)
    plain = problem.fused()
    assert plain.at_ids is None
    assert plain.top is None
    assert torch.equal(output.logprobs, plain.logprobs)
    assert torch.equal(output.entropy, plain.entropy)


@pytest.mark.parametrize("block_rows", [2, 16, 1000])
@pytest.mark.parametrize("top_k", [1, 3, 16, 20, VOCAB, VOCAB + 3])
def test_the_most_likely_ids_are_those_of_a_stable_sort(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, top_k: int
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", block_rows)
    problem = Problem()
    with torch.no_grad():  # small whole numbers: exact products, many ties
        problem.hidden.copy_(problem.hidden.round())
        problem.weight.copy_(problem.weight.round())
        logits, ids = (problem.hidden @ problem.weight[:VOCAB].T).sort(
            dim=1, descending=True, stable=True
        )
        assert (logits[:, :-1] == logits[:, 1:]).any(dim=1).all()
    top = problem.fused(top_k=top_k, chunk_tokens=7).top
    assert top is not None
    assert top.ids.dtype == torch.int64
    assert not top.logprobs.requires_grad
    assert torch.equal(top.ids, ids[:, :top_k])
    torch.testing.assert_close(top.logprobs, logits.log_softmax(dim=1)[:, :top_k])


def test_where_all_logits_are_equal_the_lowest_ids_are_the_top() -> None:
    problem = Problem()
    hidden = torch.zeros_like(problem.hidden)
    top = vocabulary_head(
        hidden, problem.weight, problem.targets, top_k=20, vocab_size=VOCAB, chunk_tokens=7
    ).top
    assert top is not None
    assert torch.equal(top.ids, torch.arange(20).expand(TOKENS, 20))


class Recorder(TorchDispatchMode):
    """Elements behind the largest tensor that any operation returned, and matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.largest = max(self.largest, elements)
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return result


@pytest.mark.parametrize("of", ["logprobs", "both"])
def test_full_logits_never_exist_in_forward_or_backward(of: str) -> None:
    problem = Problem(torch.float32, tokens=400)
    with Recorder() as dense:
        problem.gradients(problem.dense(), of=of)
    with Recorder() as fused:
        problem.gradients(problem.fused(chunk_tokens=8), of=of)
    assert dense.largest >= 400 * VOCAB  # the recorder sees what it looks for
    two_blocks, two_statistics = 2 * 8 * 16, 2 * 4 * 400
    assert fused.largest <= max(two_blocks, two_statistics, problem.hidden.numel())


def test_ids_and_top_ids_cost_no_product_and_no_full_logits() -> None:
    problem = Problem(torch.float32, tokens=400)
    with Recorder() as plain:
        problem.gradients(problem.fused(chunk_tokens=100))
    with Recorder() as fused:
        output = problem.fused(chunk_tokens=100, ids=problem.ids, top_k=4)
        problem.gradients(output, of="all")
    assert fused.products == plain.products
    two_blocks, two_statistics = 2 * 100 * 16, 2 * (4 + 5) * 400
    assert fused.largest <= max(two_blocks, two_statistics)


def test_three_numbers_per_token_wait_for_the_backward_pass_and_none_without_gradients() -> None:
    problem = Problem(tokens=400)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        problem.fused()
        inputs = (problem.hidden, problem.weight, problem.targets)
        beyond_inputs = [x for x in kept if not any(x is y for y in inputs)]
        assert [x.numel() for x in beyond_inputs] == [3 * 400]
        kept.clear()
        with torch.no_grad():
            output = problem.fused()
        assert not kept
        assert not output.logprobs.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(frozen: str) -> None:
    problem = Problem()
    expected = problem.gradients(problem.dense())
    getattr(problem, frozen).requires_grad_(False)
    output = problem.fused()
    with Recorder() as backward:
        torch.autograd.backward(list(output[:2]), list(problem.upstream.double()))
    tiles = 3
    assert backward.products == 2 * tiles  # the logits once more, and one gradient
    trained, reference = (
        (problem.weight, expected[1]) if frozen == "hidden" else (problem.hidden, expected[0])
    )
    assert getattr(problem, frozen).grad is None
    torch.testing.assert_close(trained.grad, reference)


def test_a_second_derivative_is_refused() -> None:
    problem = Problem()
    logprobs = problem.fused().logprobs
    with pytest.raises(RuntimeError, match="has no second derivative; drop create_graph"):
        torch.autograd.grad(logprobs.sum(), problem.hidden, create_graph=True)


def test_operands_that_cannot_work_are_named() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=r"1 shards of 41 rows cannot hold a vocabulary of 42"):
        vocabulary_head(problem.hidden, problem.weight, problem.targets, vocab_size=42)
    with pytest.raises(ValueError, match=r"float64 and the head's weight torch.float32"):
        vocabulary_head(problem.hidden, problem.weight.float(), problem.targets, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"model.head_chunk_tokens is 0"):
        problem.fused(chunk_tokens=0)
    with pytest.raises(ValueError, match=r"temperature is 0"):
        problem.fused(temperature=0.0)


@pytest.mark.parametrize("target", [-100, VOCAB])
def test_a_target_outside_the_vocabulary_is_named_with_its_position(target: int) -> None:
    problem = Problem()
    problem.targets[3] = target
    with pytest.raises(ValueError, match=rf"target {target} at position 3 is outside"):
        problem.fused()


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_named_with_its_position(wrong: int) -> None:
    problem = Problem()
    problem.ids[4, 2] = wrong
    with pytest.raises(ValueError, match=rf"id {wrong} at position 4, 2 is outside"):
        problem.fused(ids=problem.ids)


def test_without_working_triton_a_gpu_gets_torchs_operations_and_one_warning() -> None:
    blocks.find_kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="without its Triton kernels") as said:
        found = [blocks.find_kernels("cuda") for _ in range(2)]
    assert found == [None, None]
    assert len(said) == 1
    blocks.find_kernels.cache_clear()


def test_nothing_waits_for_a_gpu() -> None:
    """Tensors of `meta` have no values: whoever asks for one, as a synchronisation does, fails."""
    with torch.device("meta"):
        hidden, weight = (torch.ones(n, 8, requires_grad=True) for n in (6, 32))
        ids = torch.zeros(6, 3, dtype=torch.int64)
        settings: Any = {"vocab_size": 30, "chunk_tokens": 4}
        output = vocabulary_head(hidden, weight, ids[:, 0], ids=ids, top_k=2, **settings)
        value = full_divergence(hidden, weight, hidden, weight, kind="jsd", **settings)
        assert output.at_ids is not None
        (output.logprobs + output.entropy + output.at_ids.sum(dim=1) + value).sum().backward()
        sample_ids(hidden, weight, torch.zeros(6, 2), **settings)


class _Buffered:
    """What Megatron's DDP gives a parameter, and its hook."""

    def __init__(self, weight: Tensor, *, is_embedding: bool = False) -> None:
        self.weight: Any = weight
        self.weight.main_grad = torch.zeros(weight.shape)
        self.weight.grad_added_to_main_grad = False
        self.weight.zero_out_wgrad = is_embedding
        weight.register_post_accumulate_grad_hook(self._hook)

    def _hook(self, weight: Any) -> None:
        if not weight.grad_added_to_main_grad or weight.zero_out_wgrad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_weights_gradient_is_summed_in_main_grad_without_rounding(is_tied: bool) -> None:
    whole = Problem(torch.bfloat16)
    weight = whole.weight
    buffered = _Buffered(weight, is_embedding=is_tied)
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    for seed in range(3):
        problem = Problem(torch.bfloat16, seed=seed)
        problem.weight = weight
        exact = weight.detach().double().requires_grad_()
        reference = vocabulary_head(
            problem.hidden.detach().double(), exact, problem.targets, vocab_size=VOCAB
        )
        values = list(problem.fused(chunk_tokens=7)[:2])
        references = list(reference[:2])
        upstreams = [*problem.upstream]
        if is_tied:
            rows = problem.targets[:5]
            values.append(functional.embedding(rows, weight).float())
            references.append(functional.embedding(rows, exact))
            upstreams.append(torch.ones(5, HIDDEN))
        torch.autograd.backward(values, upstreams)
        torch.autograd.backward(references, [x.double() for x in upstreams])
        assert exact.grad is not None
        expected += exact.grad
    assert weight.grad is None
    torch.testing.assert_close(buffered.weight.main_grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_chunks_are_larger_on_a_gpu_unless_the_configuration_says_how_large() -> None:
    assert ModelConfig().head_chunk_tokens_on("cuda") == 4096
    assert ModelConfig().head_chunk_tokens_on("cpu") == 1024
    assert ModelConfig(head_chunk_tokens=7).head_chunk_tokens_on("cuda") == 7
