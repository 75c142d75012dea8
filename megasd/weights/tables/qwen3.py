"""Qwen3, dense: QK-norm, grouped queries, SwiGLU, no biases, tied or untied head."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.keys import DECODER, IGNORED, PLAIN, SIZE, Keys
from megasd.weights.tables.parts import attention, decoder, gated_mlp
from megasd.weights.tables.table import Table, required

KEYS = Keys(
    required={**DECODER, "head_dim": SIZE},
    structure={"attention_bias": (False,), "qkv_bias": (False,), "use_qk_norm": (True,)},
    neutral=PLAIN,
    ignored=IGNORED | {"sliding_window", "max_window_layers"},  # of use_sliding_window
)


def table(hf_config: Mapping[str, Any]) -> Table:
    required(hf_config, "head_dim")  # transformers' default is a number of its own
    return decoder(hf_config, (*attention(hf_config, qk_norm=True), *gated_mlp(hf_config)))
