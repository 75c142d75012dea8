"""The transformer layer: Transformer Engine's when it is there, else Megatron's local one.

The local spec gets two parts of ours: a norm that knows sequence parallelism, and an attention
that reads packed sequences through torch's scaled_dot_product_attention, on a CPU as on a GPU.
"""

import math
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension, under sequence parallelism too."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        # Megatron all-reduces such gradients over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence: thd in, thd out.

    Sequences are laid side by side, right-padded, for one causal kernel call: padding stands
    after every token that counts, so the causal mask alone keeps it out. Sequences of very
    different lengths in one micro-batch waste memory here; Transformer Engine's kernel does not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        # On CUDA no kernel for float32 knows grouped heads but the one that keeps all scores.
        is_on_cuda = not config.use_cpu_initialization
        self.repeats_heads = is_on_cuda and config.params_dtype is torch.float32

    def forward(
        self,
        query: Tensor,  # [T, heads, d]
        key: Tensor,  # [T, kv_heads, d]
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        assert packed_seq_params is not None, "the policy always packs"
        starts = packed_seq_params.cu_seqlens_q.long()
        lengths = starts.diff()
        position = torch.arange(packed_seq_params.max_seqlen_q, device=query.device)
        inside = position < lengths[:, None]  # [S, longest]
        place = torch.where(inside, starts[:-1, None] + position, starts[-1] - 1)
        q, k, v = (  # [S, heads, longest, d]
            x.index_select(0, place.flatten()).view(*place.shape, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )
        if self.repeats_heads:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        # Row-major: the tokens inside come back in packed order.
        return out.transpose(1, 2).flatten(0, 1).index_select(0, inside.flatten().nonzero()[:, 0])


def layer_spec(
    config: TransformerConfig, *, transformer_engine: bool, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """What GPTModel is built from on this rank."""
    parts_of_a_layer: dict[str, Any] = {
        "qk_layernorm": config.qk_layernorm,
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
    }
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(**parts_of_a_layer)
    layer = get_gpt_layer_local_spec(**parts_of_a_layer, normalization="RMSNorm")
    parts: Any = layer.submodules
    attention: Any = parts.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    final_norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)
