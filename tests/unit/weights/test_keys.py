"""config.json by an allow-list: what published models and transformers write passes, no more."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megasd.weights.hf_folder import read_hf_config
from megasd.weights.tables import config_faults, table_for

FAMILIES = ("qwen3", "qwen3_moe", "llama")

# As they were published, before transformers 5: sizes and keys of the originals.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_CODER_30B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5472,
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
LLAMA_3_2_1B = {
    "_name_or_path": "meta-llama/Llama-3.2-1B-Instruct",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
    "_commit_hash": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
}
PUBLISHED = {
    "Qwen3-8B": QWEN3_8B,
    "Qwen3-0.6B": QWEN3_8B | {"tie_word_embeddings": True, "hidden_size": 1024},
    "Qwen3-30B-A3B-2507": {
        key: value
        for key, value in QWEN3_CODER_30B.items()
        if key not in ("qkv_bias", "use_qk_norm", "shared_expert_intermediate_size")
    },
    "Qwen3-Coder-30B-A3B": QWEN3_CODER_30B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Llama-3-8B": {k: v for k, v in LLAMA_3_2_1B.items() if k not in ("head_dim", "mlp_bias")}
    | {"rope_scaling": None, "tie_word_embeddings": False},
}


def written_by_transformers(family: str, folder: Path) -> list[dict[str, Any]]:
    """All fields with their defaults, and what `save_pretrained` leaves of them."""
    config: Any = AutoConfig.for_model(family)
    config.save_pretrained(folder)
    every = json.loads(json.dumps(config.to_dict(), default=str))
    return [every, read_hf_config(folder)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_transformers_is_accepted_with_its_default(
    family: str, tmp_path: Path
) -> None:
    for hf_config in written_by_transformers(family, tmp_path):
        assert config_faults(hf_config) == []
        assert table_for(hf_config).model_type == family


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_accepted_as_they_are_and_as_transformers_5_saves_them(
    name: str, tmp_path: Path
) -> None:
    hf_config = PUBLISHED[name]
    assert config_faults(hf_config) == []
    AutoConfig.for_model(**hf_config).save_pretrained(tmp_path)
    saved = read_hf_config(tmp_path)
    assert config_faults(saved) == []
    assert table_for(saved).hf_shapes() == table_for(hf_config).hf_shapes()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_act", "gelu", 'hidden_act: "gelu" of m/config.json .* only "silu"'),
        ("use_sliding_window", True, "use_sliding_window: true of m/config.json"),
        ("layer_types", ["full_attention", "sliding_attention"] * 18, "layer_types: .* only"),
        ("layer_types", ["full_attention"] * 35, "layer_types .* names 35 layers of 36"),
        ("attention_dropout", 0.1, "attention_dropout: 0.1"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor: 0.5"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config: .*fp8"),
        ("attn_logit_softcapping", 30.0, "attn_logit_softcapping: 30.0 .* is not known here"),
        ("rms_norm_eps", None, "m/config.json lacks `rms_norm_eps`; add it"),
        ("max_position_embeddings", None, "m/config.json lacks `max_position_embeddings`"),
        ("rms_norm_eps", "1e-6", 'rms_norm_eps: "1e-6" .* must be a finite number above 0'),
        ("rms_norm_eps", float("nan"), "rms_norm_eps: NaN"),
        ("hidden_size", 4096.0, "hidden_size: 4096.0 .* must be a whole number above 0"),
        ("num_hidden_layers", True, "num_hidden_layers: true"),
        ("tie_word_embeddings", "false", 'tie_word_embeddings: "false" .* true or false'),
        ("num_key_value_heads", 5, "num_attention_heads: 32 .* no multiple of num_key_value_heads"),
        ("pad_token_id", 151936, "pad_token_id: 151936 .* outside vocab_size"),
    ],
)
def test_a_key_that_asks_for_another_model_is_one_sentence_with_file_key_and_value(
    key: str, value: Any, words: str
) -> None:
    (fault,) = config_faults(QWEN3_8B | {key: value}, "m/config.json")
    with pytest.raises(ValueError, match=f"^model.path: {words}"):
        raise ValueError(fault)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_local_experts", 64, "num_experts and num_local_experts .* differ"),
        ("num_experts_per_tok", 129, "num_experts_per_tok: 129 .* more than the experts"),
        ("norm_topk_prob", 1, "norm_topk_prob: 1 .* must be true or false"),
        ("sliding_window_size", 8, "sliding_window_size: 8"),
    ],
)
def test_what_only_a_model_with_experts_can_have_wrong(key: str, value: Any, words: str) -> None:
    (fault,) = config_faults(QWEN3_CODER_30B | {key: value})
    with pytest.raises(ValueError, match=words):
        raise ValueError(fault)


def test_a_key_is_known_to_its_own_family_only() -> None:
    (fault,) = config_faults(LLAMA_3_2_1B | {"sliding_window": 4096})
    assert "sliding_window: 4096" in fault
    assert config_faults(QWEN3_8B | {"sliding_window": 4096}) == []


@pytest.mark.parametrize(
    ("hf_config", "words"),
    [
        (QWEN3_8B | {"attention_bias": True}, "attention_bias: true"),
        (QWEN3_CODER_30B | {"shared_expert_intermediate_size": 512}, "shared_expert"),
        (QWEN3_CODER_30B | {"decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        (QWEN3_CODER_30B | {"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\]"),
        (LLAMA_3_2_1B | {"mlp_bias": True}, "mlp_bias: true"),
        (QWEN3_8B | {"hidden_size": "4096"}, 'hidden_size: "4096" .* must be a whole number'),
        (QWEN3_8B | {"model_type": ["qwen3"]}, r"model_type \['qwen3'\]"),
    ],
)
def test_a_key_that_changes_which_tensors_there_are_stops_a_conversion_too(
    hf_config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        table_for(hf_config)


def test_a_conversion_does_not_mind_what_only_the_arithmetic_asks() -> None:
    odd = QWEN3_8B | {"hidden_act": "gelu", "quantization_config": {"quant_method": "fp8"}}
    assert table_for(odd).hf_shapes() == table_for(QWEN3_8B).hf_shapes()


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '"x"'])
def test_a_config_that_is_no_object_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is not .*; write it anew"):
        read_hf_config(tmp_path)
