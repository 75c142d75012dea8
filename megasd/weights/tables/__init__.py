"""One file per model family: the table that conversion, export and engine sync all read."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables import keys, llama, qwen3, qwen3_moe
from megasd.weights.tables.table import Table

_FAMILIES = {"qwen3": qwen3, "qwen3_moe": qwen3_moe, "llama": llama}

SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)


def table_for(hf_config: Mapping[str, Any]) -> Table:
    """The table of the model that a Hugging Face config (the dict of config.json) describes.

    Names and shapes only: whether the trainer computes what the config asks for is what
    `config_faults` says.
    """
    family = _family(hf_config)
    if wrong := keys.wrong_structure(hf_config, family.KEYS):
        raise ValueError(wrong)
    return family.table(hf_config)


def config_faults(hf_config: Mapping[str, Any], file: str = "config.json") -> list[str]:
    """What `file` asks for that would not be trained, a sentence each; RoPE aside."""
    return keys.faults(hf_config, _family(hf_config).KEYS, file)


def _family(hf_config: Mapping[str, Any]) -> Any:
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ValueError(
            f"model.path: model_type {model_type!r} of config.json is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return _FAMILIES[model_type]
