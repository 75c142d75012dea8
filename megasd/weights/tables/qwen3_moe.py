"""Qwen3 with experts in every layer: as Qwen3, with a router over small SwiGLU experts."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.parts import attention, decoder, experts
from megasd.weights.tables.table import Table, refuse, required


def table(hf_config: Mapping[str, Any]) -> Table:
    refuse(hf_config, attention_bias=False, decoder_sparse_step=1, mlp_only_layers=[])
    head_dim = required(hf_config, "head_dim")
    return decoder(hf_config, (*attention(hf_config, head_dim, qk_norm=True), *experts(hf_config)))
