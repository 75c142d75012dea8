"""Llama 3.x: grouped queries, SwiGLU, no biases, no QK-norm, tied or untied head."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.parts import attention, decoder, gated_mlp
from megasd.weights.tables.table import Table, refuse, required


def table(hf_config: Mapping[str, Any]) -> Table:
    refuse(hf_config, attention_bias=False, mlp_bias=False)
    heads = required(hf_config, "num_attention_heads")
    head_dim = hf_config.get("head_dim") or required(hf_config, "hidden_size") // heads
    return decoder(
        hf_config, (*attention(hf_config, head_dim, qk_norm=False), *gated_mlp(hf_config))
    )
