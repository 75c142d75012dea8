"""Qwen3, dense: QK-norm, grouped queries, SwiGLU, no biases, tied or untied head."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.parts import attention, decoder, gated_mlp
from megasd.weights.tables.table import Table, refuse, required


def table(hf_config: Mapping[str, Any]) -> Table:
    refuse(hf_config, attention_bias=False)
    head_dim = required(hf_config, "head_dim")
    return decoder(
        hf_config, (*attention(hf_config, head_dim, qk_norm=True), *gated_mlp(hf_config))
    )
