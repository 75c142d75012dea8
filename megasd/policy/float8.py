"""Passes whose layers multiply in float8: Transformer Engine's, switched on pass by pass.

Megatron looks at `config.fp8` in every forward pass, and in the backward pass where it recomputes;
between passes it is None here. Parameters, gradients and optimizer know nothing of float8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

from torch import nn

from megasd.policy.config import FP8Config, Recipe
from megasd.weights.fp8 import BLOCK

ALIGNED = 16  # a float8 GEMM's operands begin on 16 bytes, in each of its three layouts
# e4m3 for all that is quantized, or hybrid: e5m2 for gradients, whose range is wider.
FORMATS: dict[Recipe, Literal["e4m3", "hybrid"]] = {
    "blockwise": "e4m3",
    "tensorwise": "hybrid",
    "delayed": "hybrid",
}


def tokens_of_a_multiple(fp8: FP8Config | None, *, tensor: int, sequence: bool) -> int:
    """What packed lengths are padded to: whole shares of sequence parallelism, float8's alignment.

    A rank gathers what it has quantized of its own share, by blocks only whole ones.
    """
    shares = tensor if sequence else 1
    if fp8 is None:
        return shares
    return shares * (BLOCK if shares > 1 and fp8.recipe == "blockwise" else ALIGNED)


def megatron_options(fp8: FP8Config) -> dict[str, Any]:
    """The part of Megatron's config that layers are built with."""
    kept = fp8.first_last_bf16
    return {
        "fp8": FORMATS[fp8.recipe],
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": 1024,  # delayed: Transformer Engine's own choice, not Megatron's
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": kept > 0,
        "num_layers_at_start_in_bf16": kept,
        "num_layers_at_end_in_bf16": kept,
    }


@contextmanager
def switched_on(gpt: nn.Module, fp8: FP8Config | None) -> Iterator[None]:
    """Within the block the layers of `gpt` multiply in float8; with None it changes nothing.

    The float8 copies of the weights, which Transformer Engine keeps from micro-batch to
    micro-batch, end with the block: the next pass may have other weights in their place, and
    what samples next wants the memory.
    """
    if fp8 is None:
        yield
        return
    config: Any = gpt.config
    config.fp8 = FORMATS[fp8.recipe]
    # Experts get whole multiples of tokens by routing a few to more experts, with weight 0.
    config.moe_router_padding_for_quantization = config.num_moe_experts is not None
    try:
        yield
    finally:
        config.fp8, config.moe_router_padding_for_quantization = None, False
        forget_copies(gpt)


def forget_copies(gpt: nn.Module) -> None:
    """Drop the float8 copies of the weights."""
    for layer in _transformer_engine_layers(gpt):
        layer._fp8_workspaces.clear()


def keep_scales(gpt: nn.Module, fp8: FP8Config | None) -> None:
    """Have the scales of delayed scaling saved with the layers.

    Transformer Engine saves them of layers whose last pass was in float8; here others come between.
    """
    if fp8 is None or fp8.recipe != "delayed":
        return
    for layer in _transformer_engine_layers(gpt):
        layer.fp8_meta["fp8_checkpoint"] = layer.fp8_meta_tensors_initialized


def _transformer_engine_layers(gpt: nn.Module) -> Iterator[Any]:
    base: Any = import_module("transformer_engine.pytorch.module.base")
    return (layer for layer in gpt.modules() if isinstance(layer, base.TransformerEngineBaseModule))
