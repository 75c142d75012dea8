"""FP8 as Transformer Engine's kernels make it: real float8 bytes and scales in its own classes.

Its three recipes for Hopper: delayed and current scaling of whole tensors, and scaling of blocks of
128 (of a row or a column; weights of 128 x 128). A product in FP8 is that of the values that the
bytes and scales stand for.
"""
# ruff: noqa: N815  (their names)

import importlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128


class DType(IntEnum):
    """Transformer Engine's names and numbers of types."""

    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10

    @property
    def torch(self) -> torch.dtype:
        return _TORCH[self]


_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kInt64: torch.int64,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def quantize(x: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`x` as the quantizer says, in a new tensor or in `output`; nothing where `noop` is not 0."""
    if noop is not None and float(noop) != 0:
        return output
    if output is None:
        output = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)
    if type(quantizer).__name__ == "Float8BlockQuantizer":
        _quantize_blocks(x, quantizer, output)
    else:
        _quantize_whole(x, quantizer, output)
    return output


def split_quantize(x: Tensor, sizes: Sequence[int], quantizers: Sequence[Any]) -> list[Any]:
    return [quantize(*pair) for pair in zip(x.split(list(sizes)), quantizers, strict=True)]


def dequantize(x: Any, dtype: DType) -> Tensor:
    """Of a tensor with one scale."""
    return (_floats(x._data, x._fp8_dtype) * x._scale_inv).to(dtype.torch)


def operand(x: Any, *, columnwise: bool) -> Tensor:
    """What a matrix product reads, in float32: Hopper sums FP8 along the last dimension only, so
    there is a copy for each direction, and the one that is asked for must be there."""
    if hasattr(x, "_transpose"):
        if not columnwise:
            return _floats(x._data, x._fp8_dtype) * x._scale_inv
        assert not x._transpose_invalid, "the copy of an FP8 operand that a product wants is gone"
        return (_floats(x._transpose, x._fp8_dtype) * x._scale_inv).movedim(0, -1)
    if hasattr(x, "_columnwise_data"):
        parts = x.get_metadata()
        for part in ("rowwise", "columnwise"):
            if (part == "columnwise") != columnwise:
                parts |= {f"{part}_data": None, f"{part}_scale_inv": None}
        kind: Any = importlib.import_module("transformer_engine.pytorch")
        return kind.Float8BlockwiseQTensorStorage(**parts).dequantize(dtype=torch.float32)
    return x.float()


def fp8_transpose(data: Tensor, dtype: DType, out: Tensor | None = None) -> Tensor:
    """The last dimension first."""
    moved = data.movedim(-1, 0).contiguous()
    return moved if out is None else out.copy_(moved)


def update_delayed_scales(
    new: Tensor,  # [sum of the quantizers]: the largest values since the last update
    histories: Sequence[Tensor],  # [length, quantizers] each
    scales: Sequence[Tensor],
    algorithm: str,
    dtype: DType,
    margin: int,
) -> None:
    """Delayed scaling, once per step: the next scale fits the largest value of the history."""
    sizes = [history.shape[1] for history in histories]
    for amax, history, scale in zip(new.split(sizes), histories, scales, strict=True):
        seen = torch.cat([history[1:], amax[None]])
        largest = amax if algorithm == "most_recent" else seen.amax(dim=0)
        history.copy_(seen)
        history[0].zero_()
        fits = torch.finfo(dtype.torch).max / largest / 2.0**margin
        scale.copy_(torch.where((largest > 0) & largest.isfinite(), fits, scale))


def _floats(data: Tensor, dtype: DType) -> Tensor:
    return data.view(dtype.torch).float()


def _bytes(scaled: Tensor, dtype: DType) -> Tensor:
    largest = torch.finfo(dtype.torch).max
    return scaled.clamp(-largest, largest).to(dtype.torch).view(torch.uint8)


def _fitting_scale(amax: Tensor, quantizer: Any) -> Tensor:
    """What brings the largest value to the largest of the type; 1 where all are 0."""
    fits = torch.finfo(quantizer.dtype.torch).max / amax.clamp(min=quantizer.amax_epsilon)
    fits = torch.where((amax > 0) & amax.isfinite() & fits.isfinite(), fits, 1.0)
    return fits.log2().floor().exp2() if quantizer.force_pow_2_scales else fits


def _quantize_whole(x: Tensor, quantizer: Any, output: Any) -> None:
    amax = x.detach().float().abs().max() if x.numel() else torch.zeros(())
    is_delayed = type(quantizer).__name__ == "Float8Quantizer"
    if is_delayed:
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale
    else:
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
        quantizer.amax.copy_(amax)
        scale = _fitting_scale(amax, quantizer)
        quantizer.scale.copy_(scale)
    data = _bytes(x.detach().float() * scale, quantizer.dtype)
    output._scale_inv.copy_(1 / scale)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(data.movedim(-1, 0))
        output._transpose_invalid = False


def _quantize_blocks(x: Tensor, quantizer: Any, output: Any) -> None:
    compact = quantizer.all_gather_usage
    flat = x.detach().float().reshape(-1, x.shape[-1])
    if output._rowwise_data is not None:
        data, inverse = _in_blocks(flat, quantizer)
        output._rowwise_data.copy_(data.view_as(output._rowwise_data))
        _write_scales(output._rowwise_scale_inv, inverse, quantizer, upright=compact)
    if output._columnwise_data is not None:
        data, inverse = _in_blocks(flat.T, quantizer)
        data = data.T if compact else data
        output._columnwise_data.copy_(data.reshape(output._columnwise_data.shape))
        _write_scales(output._columnwise_scale_inv, inverse, quantizer, upright=False)


def _in_blocks(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes of a matrix [m, k] in blocks of its rows or squares, and the inverse of their scales:
    [m, k / 128] or [m / 128, k / 128]."""
    (m, k), height = x.shape, BLOCK if quantizer.block_scaling_dim == 2 else 1
    padded = functional.pad(x, (0, -k % BLOCK, 0, -m % height))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))  # [., height, ., 128]
    amax = blocks.abs().amax(dim=(1, 3)) if x.numel() else blocks.new_zeros(*blocks.shape[::2])
    scale = _fitting_scale(amax, quantizer)
    data = _bytes(blocks * scale[:, None, :, None], quantizer.dtype)
    return data.flatten(2, 3).flatten(0, 1)[:m, :k], 1 / scale


def _write_scales(target: Tensor, inverse: Tensor, quantizer: Any, *, upright: bool) -> None:
    """cuBLAS wants the scales of rows transposed, and both kinds padded to multiples of 4."""
    if quantizer.block_scaling_dim == 1 and not upright:
        inverse = inverse.T
    rows, columns = inverse.shape
    target.zero_()
    target[:rows, :columns].copy_(inverse)
