"""Rotary position embeddings of a config.json, as GPTModel's arguments."""

from collections.abc import Mapping
from typing import Any

# What Megatron writes into its own scaling; a model with other numbers would be silently wrong.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_arguments(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of RoPE, wherever this version of transformers wrote them.

    Plain RoPE and Llama 3's scaling are known. Raises ValueError for any other, and for numbers
    of Llama 3's that Megatron has fixed otherwise.
    """
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    base = hf_config.get("rope_theta", rope.get("rope_theta"))
    if base is None:
        raise ValueError("model.path: config.json names no rope_theta; add the model's RoPE base")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rotary_base": float(base)}
    if kind != "llama3":
        raise ValueError(
            f"model.path: config.json asks for RoPE of type {kind!r}, which is not supported; "
            "use a checkpoint with plain RoPE or Llama 3's"
        )
    for key, value in _LLAMA3.items():
        if rope.get(key) != value:
            raise ValueError(
                f"model.path: {key} of config.json's RoPE scaling is {rope.get(key)}, and Megatron "
                f"computes with {value:g} only; use a checkpoint that says so"
            )
    if rope.get("factor") is None:
        raise ValueError("model.path: config.json names no factor of its RoPE scaling; add it")
    return {
        "rotary_base": float(base),
        "rope_scaling": True,
        "rope_scaling_factor": float(rope["factor"]),
    }
