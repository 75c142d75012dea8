"""The kernels of the stand-in against independent computations: what they stand for."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megasd.testing.ranks import Ranks
from tests.te_stub import fp8, kernels
from tests.te_stub.cases import with_transformer_engine
from tests.te_stub.fp8 import DType

STARTS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_args(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple:
    layout = ("NVTE_THD_THD_THD", "NVTE_NO_BIAS", "NVTE_PADDING_CAUSAL_MASK")
    shape = (0.3, 0.0, True, *layout, "NVTE_VANILLA_SOFTMAX", (-1, 0))
    if more:
        return (7, 7, *shape, True, STARTS, STARTS, q, k, v, *more)
    return (7, 7, True, *shape, STARTS, STARTS, q, k, v, torch.float32, STARTS, STARTS)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token by token in float64; two heads of queries to one of keys."""
    out = torch.zeros_like(q)
    for start, end in [(0, 5), (5, 6), (6, 13)]:
        for t in range(start, end):
            for head in range(q.shape[1]):
                scores = (k[start : t + 1, head // 2] @ q[t, head]) * 0.3
                out[t, head] = scores.softmax(0) @ v[start : t + 1, head // 2]
    return out


def test_attention_is_causal_within_each_sequence_and_so_are_its_gradients() -> None:
    q, k, v = draw(13, 4, 8), draw(13, 2, 8, seed=1), draw(13, 2, 8, seed=2)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(wide[0] + 0, wide[1], wide[2])
    out, *_ = kernels.fused_attn_fwd(*attention_args(q, k, v))
    torch.testing.assert_close(out.double(), expected.detach(), atol=1e-6, rtol=0)
    towards = draw(13, 4, 8, seed=3)
    gradients = torch.autograd.grad(expected, wide, towards.double())
    *found, bias = kernels.fused_attn_bwd(*attention_args(q, k, v, out, towards))
    assert bias is None
    for ours, theirs in zip(found, gradients, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)


def test_padding_between_or_after_sequences_is_not_what_the_policy_packs() -> None:
    q, k, v = draw(13, 4, 8), draw(13, 2, 8), draw(13, 2, 8)
    args = list(attention_args(q, k, v))
    args[-1] = STARTS + 1
    with pytest.raises(AssertionError, match="end to end"):
        kernels.fused_attn_fwd(*args)


def test_a_products_layouts_are_those_of_a_linear_layers_three() -> None:
    weight, x, grad = draw(6, 4), draw(3, 5, 4, seed=1), draw(3, 5, 6, seed=2)

    def product(a: Tensor, b: Tensor, layout: str, **more: Any) -> Any:
        fixed = (None, DType.kFloat32, None, DType.kBFloat16, False, None, False)
        sizes = (torch.empty(0), 0, more.get("accumulate", False), True)
        flags = (layout[0] == "T", b, layout[1] == "T", more.get("out"))
        return kernels.generic_gemm(a, *flags, *fixed, *sizes)[0]

    wide, wide_x = weight.double(), x.double()
    torch.testing.assert_close(product(weight, x, "TN").double(), wide_x @ wide.T)
    torch.testing.assert_close(product(weight, grad, "NN").double(), grad.double() @ wide)
    of_weight = torch.einsum("abn,abk->nk", grad.double(), wide_x)
    main_grad = draw(6, 4, seed=4)
    before = main_grad.double()
    product(x, grad, "NT", accumulate=True, out=main_grad)
    torch.testing.assert_close(main_grad.double(), before + of_weight, atol=1e-5, rtol=1e-5)


def test_tokens_go_to_their_experts_in_order_and_come_back_summed() -> None:
    routing = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    x, probs = draw(5, 4), draw(5, 3, seed=1)
    row_map = kernels.make_row_id_map(routing, 5, 3)
    out, _, permuted = kernels.permute_with_mask_map(x, row_map, probs, None, 5, 3, 7, 4, None)
    pairs = [(0, 0), (1, 0), (3, 0), (0, 1), (3, 1), (1, 2), (2, 2)]  # token, expert
    assert permuted is not None
    assert torch.equal(out, torch.stack([x[token] for token, _ in pairs]))
    assert permuted.tolist() == [float(probs[pair]) for pair in pairs]
    back, of_probs = kernels.unpermute_with_mask_map(out, row_map, None, permuted, 5, 3, 4)
    torch.testing.assert_close(back, x * routing.sum(dim=1, keepdim=True))
    assert of_probs is not None
    assert torch.equal(of_probs, probs * routing)


def test_chunks_change_places_and_change_back() -> None:
    x, sizes, order = draw(6, 2), torch.tensor([1, 3, 2]), torch.tensor([2, 0, 1])
    chunk_map = kernels.make_chunk_sort_map(sizes, order, 6, 3)
    moved, _ = kernels.sort_chunks_by_map(x, chunk_map, None, 6, 2, True)
    assert torch.equal(moved, torch.cat([x[4:], x[:1], x[1:4]]))
    assert torch.equal(kernels.sort_chunks_by_map(moved, chunk_map, None, 6, 2, False)[0], x)


def quantized(kind: str, x: Tensor) -> dict[str, Tensor]:
    """Both copies of `x` as a product reads them, and as Transformer Engine dequantizes."""
    import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]

    if kind == "tensor":
        quantizer = engine.Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device=x.device)
    else:
        size = {"rows": 1, "squares": 2}[kind]
        usage = {"rowwise": True, "columnwise": True, "block_scaling_dim": size}
        quantizer = engine.Float8BlockQuantizer(DType.kFloat8E4M3, **usage)
    made = quantizer(x)
    return {
        "rowwise": fp8.operand(made, columnwise=False),
        "columnwise": fp8.operand(made, columnwise=True),
        "theirs": made.dequantize(dtype=torch.float32),
    }


@pytest.mark.parametrize("kind", ["tensor", "rows", "squares"])
def test_float8_keeps_each_value_to_its_blocks_scale(kind: str, te: Ranks) -> None:
    """Within half a step of float8, whose scale a block's largest value sets; by both copies."""
    x = draw(130, 260) * torch.logspace(-3, 3, 130)[:, None]
    x[:, 200:] *= 50.0
    (found,) = te.run(with_transformer_engine, quantized, kind, x, world_size=1)
    np.testing.assert_array_equal(found["rowwise"], found["theirs"])
    for name, height, width in [("rowwise", 1, 128), ("columnwise", 128, 1)]:
        if kind == "tensor":
            height, width = 130, 260
        if kind == "squares":
            height = width = 128
        for top in range(0, 130, height):
            for left in range(0, 260, width):
                block = x[top : top + height, left : left + width]
                read = found[name][top : top + height, left : left + width]
                scale = block.abs().max() / 448.0
                step = torch.maximum(block.abs() / 16.0, scale * 2.0**-8)  # scales: powers of 2
                assert ((read - block).abs() <= step).all(), (name, top, left)


def test_a_copy_that_was_dropped_is_missed() -> None:
    class Dropped:
        _transpose, _transpose_invalid = None, True

    with pytest.raises(AssertionError, match="is gone"):
        fp8.operand(Dropped(), columnwise=True)
