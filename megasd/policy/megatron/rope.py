"""Rotary position embeddings of a config.json, as GPTModel's arguments."""

import json
from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.keys import NUMBER

# What Megatron writes into its own scaling; a model with other numbers would be silently wrong.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_OF_TYPE = {"default": _ANY, "llama3": {*_ANY, *_LLAMA3, "factor"}}


def rope_arguments(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of RoPE, wherever some version of transformers wrote them.

    What transformers 5 reads is taken: `rope_scaling` (the old name) before `rope_parameters`, and
    the base there before `rope_theta` beside it. Older versions read other places, so where two
    places say different things, ValueError names both. Plain RoPE and Llama 3's scaling are known;
    ValueError for any other, and for numbers of Llama 3's that Megatron has fixed otherwise.
    """
    places = ("rope_scaling", "rope_parameters")
    stated = {place: _checked(place, hf_config[place]) for place in places if hf_config.get(place)}
    rope, *others = [*stated.values()] or [{}]
    scaling = _scaling(hf_config, rope)
    if others and _scaling(hf_config, others[0]) != scaling:
        raise ValueError(
            "model.path: rope_scaling and rope_parameters of config.json ask for different RoPE: "
            f"{json.dumps(rope)} and {json.dumps(others[0])}; keep the one that the model was "
            "trained with"
        )
    return {"rotary_base": _base(hf_config, stated, rope)} | scaling


def _checked(place: str, rope: Any) -> Mapping[str, Any]:
    """What one place says, if its keys are those of a RoPE that is known."""
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise ValueError(
            f"model.path: {place} of config.json is not one RoPE for all layers, which alone is "
            "supported; choose such a model"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != rope.get("type", kind):
        raise ValueError(
            f"model.path: {place} of config.json has rope_type {kind!r} and type {rope['type']!r}; "
            "take the wrong one out"
        )
    if kind not in _OF_TYPE:
        raise ValueError(
            f"model.path: config.json asks for RoPE of type {kind!r}, which is not supported; "
            "use a checkpoint with plain RoPE or Llama 3's"
        )
    for key, value in rope.items():
        is_partial = key == "partial_rotary_factor" and value not in (1, None)
        if is_partial or (key not in _OF_TYPE[kind] and value is not None):
            raise ValueError(
                f"model.path: {key}: {json.dumps(value)} in {place} of config.json is not "
                f"supported with RoPE of type {kind!r}; choose a model without it"
            )
    return rope


def _scaling(hf_config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return {}
    # transformers takes the context for the one before scaling where nothing else is said.
    said = {"original_max_position_embeddings": hf_config.get("max_position_embeddings"), **rope}
    for key, value in _LLAMA3.items():
        if said.get(key) != value:
            raise ValueError(
                f"model.path: {key} of config.json's RoPE scaling is {said.get(key)}, and Megatron "
                f"computes with {value:g} only; use a checkpoint that says so"
            )
    if rope.get("factor") is None:
        raise ValueError("model.path: config.json names no factor of its RoPE scaling; add it")
    return {"rope_scaling": True, "rope_scaling_factor": _number("factor", rope["factor"])}


def _base(
    hf_config: Mapping[str, Any],
    stated: Mapping[str, Mapping[str, Any]],
    rope: Mapping[str, Any],  # the one of `stated` that is read
) -> float:
    bases = {f"{place}.rope_theta": said.get("rope_theta") for place, said in stated.items()}
    bases = {"rope_theta": hf_config.get("rope_theta"), **bases}
    bases = {place: _number(place, base) for place, base in bases.items() if base is not None}
    if not bases:
        raise ValueError("model.path: config.json names no rope_theta; add the model's RoPE base")
    is_read = "rope_theta" in rope or "rope_theta" in bases
    if len(set(bases.values())) > 1 or not is_read:
        said = " and ".join(f"{place} {base:g}" for place, base in bases.items())
        why = "which differ" if is_read else "where it is not read beside rope_scaling"
        raise ValueError(
            f"model.path: config.json has {said}, {why}; write the base that the model was "
            "trained with in all of its places"
        )
    return next(iter(bases.values()))


def _number(key: str, value: Any) -> float:
    if not NUMBER.holds(value):
        raise ValueError(
            f"model.path: {key}: {json.dumps(value)} of config.json must be {NUMBER.words}"
        )
    return float(value)
