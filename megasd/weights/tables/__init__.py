"""One file per model family: the table that conversion, export and engine sync all read."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables import llama, qwen3, qwen3_moe
from megasd.weights.tables.table import Table

_FAMILIES = {"qwen3": qwen3.table, "qwen3_moe": qwen3_moe.table, "llama": llama.table}

SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)


def table_for(hf_config: Mapping[str, Any]) -> Table:
    """The table of the model that a Hugging Face config (the dict of config.json) describes."""
    model_type = hf_config.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model.path: model_type {model_type!r} of config.json is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return _FAMILIES[model_type](hf_config)
