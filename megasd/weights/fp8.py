"""Weights as float8, the way Hugging Face FP8 checkpoints hold them.

A 2-D weight W of a linear layer becomes W8 in float8_e4m3fn under its own name, and one float32
scale per block of 128 x 128 under `<name>_scale_inv`, so that W ~ W8 * scale. The scale maps the
block's largest magnitude onto the largest float8, 448; a block of zeros has scale 1. Embeddings,
norms, biases, routers and the head stay as they are.

Only the arithmetic is tested: an engine with such weights was not yet run on a GPU.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megasd.weights.bucket import Bucket

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
# Elements that are rounded in one call: for a small matrix alone, launching kernels costs more than
# what they do. 64 MiB in float32.
AT_ONCE = 2**24


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor of this Hugging Face name travels as float8."""
    return len(shape) == 2 and name.endswith("_proj.weight")


def unquantized_modules(hf_shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Modules whose matrix stays as it is, as an FP8 checkpoint's config lists them.

    vLLM makes a router of experts in float8 like any linear layer unless its full name is there.
    """
    kept = [name for name, shape in hf_shapes.items() if not is_quantized(name, shape)]
    matrices = [name.removesuffix(".weight") for name in kept if len(hf_shapes[name]) == 2]
    return list(dict.fromkeys(["lm_head", *matrices]))  # the head may be tied and have no name


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(W8 [..., rows, columns] float8_e4m3fn, scales [..., rows / 128, columns / 128] float32,
    rounded up). Of each matrix by itself, so that many of one shape may be one call.

    Rounds to the nearest float8; the error of an element is at most 1/16 of it, or 2^-10 scales.
    """
    *many, rows, columns = weight.shape
    up, across = math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)
    padded = weight.new_zeros(*many, up * BLOCK, across * BLOCK, dtype=torch.float32)
    padded[..., :rows, :columns] = weight
    blocks = padded.view(*many, up, BLOCK, across, BLOCK)
    largest = blocks.abs().amax((-3, -1))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    # A quotient may round to just above the largest float8, which would become NaN.
    scaled = (blocks / scales[..., :, None, :, None]).clamp(-LARGEST, LARGEST)
    whole = scaled.view(*many, up * BLOCK, across * BLOCK)[..., :rows, :columns]
    return whole.to(torch.float8_e4m3fn), scales


def quantized(bucket: Bucket) -> Bucket:
    """The bucket as it travels: `flat` is bytes; wider dtypes stand first, so all are aligned."""
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for names in _batches(bucket):
        matrices = torch.stack([bucket.tensors[name] for name in names])
        made |= zip(names, zip(*map(torch.unbind, quantize(matrices)), strict=True), strict=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in bucket.tensors.items():
        if name in made:
            tensors[name], tensors[f"{name}_scale_inv"] = made[name]
        else:
            tensors[name] = tensor
    in_order = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    return _packed(in_order)


def _batches(bucket: Bucket) -> Iterator[list[str]]:
    """Names of what travels as float8: matrices of one shape, in calls of so many elements."""
    by_shape: dict[torch.Size, list[str]] = {}
    for name, tensor in bucket.tensors.items():
        if is_quantized(name, tuple(tensor.shape)):
            by_shape.setdefault(tensor.shape, []).append(name)
    for shape, names in by_shape.items():
        together = max(1, AT_ONCE // shape.numel())
        yield from (names[i : i + together] for i in range(0, len(names), together))


def _packed(tensors: Mapping[str, Tensor]) -> Bucket:
    raw = {name: tensor.contiguous().view(-1).view(torch.uint8) for name, tensor in tensors.items()}
    flat = torch.cat(list(raw.values()))
    parts = flat.split([len(part) for part in raw.values()])
    views = {
        name: part.view(tensor.dtype).view(tensor.shape)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }
    return Bucket(views, flat)
