"""Float8 weights against float64: every element within half a step of its block's float8 grid."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megasd.weights import fp8
from megasd.weights.bucket import Bucket
from megasd.weights.fp8 import is_quantized, quantize, quantized


def grid() -> np.ndarray:
    """Every finite float8_e4m3fn that is not negative: 4 exponent and 3 mantissa bits."""
    values = [m / 8 * 2.0**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array(values[:-1])  # the last pattern is NaN


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 70), (5, 300)])
def test_every_element_is_the_nearest_float8_of_its_block(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()
    weight = weight.bfloat16()
    small, scales = quantize(weight)
    assert small.dtype == torch.float8_e4m3fn
    assert small.shape == weight.shape
    assert scales.dtype == torch.float32
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    values = grid()
    assert values[-1] == 448
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            block = weight[part].double().numpy()
            scale = np.abs(block).max() / 448
            assert scales[i, j].item() == pytest.approx(scale, rel=1e-6)
            wanted = np.abs(block)[..., None] / scale
            nearest = np.abs(wanted - values).min(-1)
            got = np.abs(small[part].double().numpy() - block / scale)
            np.testing.assert_allclose(got, nearest, rtol=0, atol=1e-4)


def test_zeros_and_the_largest_elements_survive() -> None:
    weight = torch.zeros(256, 128)
    weight[200, 5] = -3.0
    small, scales = quantize(weight)
    assert scales[0, 0] == 1
    restored = small.float() * scales.repeat_interleave(128, 0)
    torch.testing.assert_close(restored, weight)


def test_only_weights_of_linear_layers_travel_as_float8() -> None:
    inside = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.1.mlp.experts.7.gate_proj.weight",
    ]
    assert all(is_quantized(name, (256, 128)) for name in inside)
    outside = {
        "model.embed_tokens.weight": (256, 128),
        "lm_head.weight": (256, 128),
        "model.layers.1.mlp.gate.weight": (8, 128),
        "model.layers.0.self_attn.q_norm.weight": (128,),
        "model.layers.0.self_attn.q_proj.bias": (128,),
    }
    assert not any(is_quantized(name, shape) for name, shape in outside.items())


def test_a_bucket_keeps_its_tensors_beside_their_scales_in_one_piece_of_memory() -> None:
    shapes = {"a.q_proj.weight": (3, 5), "norm.weight": (7,), "b.up_proj.weight": (129, 3)}
    memory = torch.randn(sum(int(np.prod(shape)) for shape in shapes.values())).bfloat16()
    bucket = Bucket.over(memory, shapes)
    wire = quantized(bucket)
    assert set(wire.tensors) == {
        *shapes,
        "a.q_proj.weight_scale_inv",
        "b.up_proj.weight_scale_inv",
    }
    assert wire.flat.dtype == torch.uint8
    start = wire.flat.data_ptr()
    for tensor in wire.tensors.values():
        assert tensor.data_ptr() == start, "no gaps"
        assert start % tensor.element_size() == 0
        start += tensor.nbytes
    assert start == wire.flat.data_ptr() + wire.flat.nbytes
    torch.testing.assert_close(wire.tensors["norm.weight"], bucket.tensors["norm.weight"])
    small, scales = quantize(bucket.tensors["b.up_proj.weight"])
    assert torch.equal(wire.tensors["b.up_proj.weight"].float(), small.float())
    assert torch.equal(wire.tensors["b.up_proj.weight_scale_inv"], scales)


class Counted(TorchDispatchMode):
    """Counts operations that a GPU would launch kernels for."""

    launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launched += func.overloadpacket not in VIEWS
        return func(*args, **kwargs or {})


aten = torch.ops.aten
VIEWS = (aten.view, aten.slice, aten.unbind, aten.unsqueeze, aten.split, aten.split_with_sizes)
VIEWS += (aten.detach, aten.new_empty, aten._unsafe_view, aten.alias)


def test_many_small_matrices_are_rounded_in_a_few_calls_each_as_if_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = {f"experts.{e}.{n}_proj.weight": (96, 130) for e in range(40) for n in ("up", "gate")}
    memory = torch.randn(81 * 96 * 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    bucket = Bucket.over(memory, experts | {"down_proj.weight": (130, 96)})
    with Counted() as batched:
        wire = quantized(bucket)
    monkeypatch.setattr(fp8, "AT_ONCE", 1)
    with Counted() as alone:
        expected = quantized(bucket)
    assert batched.launched < 40 < 600 < alone.launched
    assert list(wire.tensors) == list(expected.tensors)
    assert torch.equal(wire.flat, expected.flat)
