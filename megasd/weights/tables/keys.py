"""What a config.json may hold: an allow-list, because a key that nobody reads may be arithmetic.

A key is read, or must have the one value under which it changes nothing, or does not touch the
arithmetic. Whatever else is set to something is refused before a model is built from it.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """What the value of a key that is read must be."""

    words: str
    holds: Callable[[Any], bool]


SIZE = Kind("a whole number above 0", lambda value: type(value) is int and value > 0)
NUMBER = Kind(
    "a finite number above 0",
    lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0,
)
FLAG = Kind("true or false", lambda value: type(value) is bool)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of one family. A key that is null is taken as not set."""

    required: Mapping[str, Kind]  # the model is built from them
    optional: Mapping[str, Kind] = field(default_factory=dict)  # with transformers' default
    structure: Mapping[str, tuple[Any, ...]]  # the values under which the table holds every tensor
    neutral: Mapping[str, tuple[Any, ...]]  # the values under which a key changes nothing
    ignored: frozenset[str]  # not of the arithmetic
    """Of a list, `structure` and `neutral` look at each element."""


# RoPE has a reader of its own, policy/megatron/rope.py.
ROPE = frozenset({"rope_theta", "rope_parameters", "rope_scaling"})

DECODER: Mapping[str, Kind] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": NUMBER,
    "tie_word_embeddings": FLAG,
}
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0,),
    "layer_types": ("full_attention", "attention"),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "quantization_config": (),
    "per_layer_config": ({},),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
# Of transformers' base class: how a model is loaded, started, run or labelled.
_OF_THE_LIBRARY = """
    architectures model_type transformers_version torch_dtype dtype initializer_range use_cache
    pretraining_tp name_or_path _name_or_path _commit_hash _attn_implementation_autoset
    attn_implementation _attn_implementation experts_implementation _experts_implementation
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss
    is_decoder id2label label2id num_labels problem_type finetuning_task task_specific_params
    tie_last_hidden_states tokenizer_class prefix bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id unsloth_fixed unsloth_version
"""
# Sampling, as old exports have it: a run's own config says how it samples.
_OF_SAMPLING = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    top_k top_p typical_p
"""
IGNORED = frozenset((_OF_THE_LIBRARY + _OF_SAMPLING).split())


def wrong_structure(hf_config: Mapping[str, Any], keys: Keys) -> str | None:
    """The first key under which the family has other tensors than its table, or no shapes."""
    for key, kind in (*keys.required.items(), *keys.optional.items()):
        if (value := hf_config.get(key)) is not None and not kind.holds(value):
            return f"model.path: {key}: {_shown(value)} of config.json must be {kind.words}"
    for key, allowed in keys.structure.items():
        if not _is_one_of(hf_config.get(key), allowed):
            said = _shown(hf_config[key])
            return f"model.path: {key}: {said} of config.json is not supported"
    return None


def faults(hf_config: Mapping[str, Any], keys: Keys, file: str) -> list[str]:
    """Sentences about every key of `file` that asks for another model than would be trained."""
    found = []
    set_keys = {key: value for key, value in hf_config.items() if value is not None}
    for key in keys.required:
        if key not in set_keys:
            found.append(f"{file} lacks `{key}`; add it")
    for key, value in set_keys.items():
        kind = keys.required.get(key) or keys.optional.get(key)
        if kind is not None:
            if not kind.holds(value):
                found.append(f"{key}: {_shown(value)} of {file} must be {kind.words}; correct it")
        elif key in keys.neutral:
            if not _is_one_of(value, keys.neutral[key]):
                only = " or ".join(map(_shown, keys.neutral[key])) or "a model without it"
                found.append(
                    f"{key}: {_shown(value)} of {file} is not supported, only {only}; choose a "
                    "model that says so"
                )
        elif key not in keys.structure and key not in keys.ignored and key not in ROPE:
            found.append(
                f"{key}: {_shown(value)} of {file} is a key that is not known here and may change "
                f"what the model computes; take it out if this model does not need it"
            )
    return [f"model.path: {fault}" for fault in found or _relations(hf_config, file)]


def _relations(hf_config: Mapping[str, Any], file: str) -> list[str]:
    """What is wrong between keys that are right each."""
    found = []

    def whole(key: str, of: str) -> None:
        if hf_config[key] % hf_config[of]:
            found.append(f"{key}: {hf_config[key]} of {file} is no multiple of {of}")

    whole("num_attention_heads", "num_key_value_heads")
    if hf_config.get("head_dim") is None:
        whole("hidden_size", "num_attention_heads")
    layers, types = hf_config["num_hidden_layers"], hf_config.get("layer_types")
    if types is not None and len(types) != layers:
        found.append(f"layer_types of {file} names {len(types)} layers of {layers}")
    names = ("num_experts", "num_local_experts")
    counts = {hf_config[name] for name in names if hf_config.get(name) is not None}
    if len(counts) > 1:
        found.append(f"num_experts and num_local_experts of {file} differ")
    per_token = hf_config.get("num_experts_per_tok")
    if counts and per_token is not None and per_token > min(counts):
        found.append(f"num_experts_per_tok: {per_token} of {file} is more than the experts")
    padding = hf_config.get("pad_token_id")
    if type(padding) is int and padding >= hf_config["vocab_size"]:
        found.append(f"pad_token_id: {padding} of {file} is outside vocab_size")
    return [f"{fault}; correct it" for fault in found]


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    if value is None:
        return True
    return all(one in allowed for one in (value if isinstance(value, list) else [value]))


def _shown(value: Any) -> str:
    """As in JSON; long ones cut."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
