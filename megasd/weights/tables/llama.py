"""Llama 3.x: grouped queries, SwiGLU, no biases, no QK-norm, tied or untied head."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.keys import DECODER, IGNORED, PLAIN, SIZE, Keys
from megasd.weights.tables.parts import attention, decoder, gated_mlp
from megasd.weights.tables.table import Table

KEYS = Keys(
    required=DECODER,
    optional={"head_dim": SIZE},
    structure={"attention_bias": (False,), "mlp_bias": (False,)},
    neutral=PLAIN,
    ignored=IGNORED | {"is_llama_config"},
)


def table(hf_config: Mapping[str, Any]) -> Table:
    return decoder(hf_config, (*attention(hf_config, qk_norm=False), *gated_mlp(hf_config)))
