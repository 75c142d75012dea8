"""The table of a family names exactly the tensors that transformers has, and is light."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from megasd.weights.hf_folder import HFFolder, read_hf_config
from megasd.weights.tables import SUPPORTED_MODEL_TYPES, table_for

FAMILIES = {"qwen3": tiny_qwen3, "qwen3_moe": tiny_qwen3_moe, "llama": tiny_llama}


def qwen3_config(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return Qwen3Config(**(sizes | changes)).to_dict()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_a_folder_that_transformers_writes(
    tmp_path: Path, family: str, tied: bool
) -> None:
    """Not those in memory, where transformers holds the experts of a layer in one tensor."""
    folder = FAMILIES[family](tmp_path, tie=tied, vocab=121)
    assert HFFolder(folder).shapes == table_for(read_hf_config(folder)).hf_shapes()


def test_the_number_of_experts_has_two_names(tmp_path: Path) -> None:
    """Published models have the first, what transformers 5 writes has the second."""
    hf_config = read_hf_config(tiny_qwen3_moe(tmp_path, experts=6))
    count = hf_config.pop("num_local_experts")
    published = table_for({**hf_config, "num_experts": count})
    assert published.num_experts == table_for({**hf_config, "num_local_experts": count}).num_experts
    with pytest.raises(ValueError, match="lacks `num_experts`"):
        table_for(hf_config)


@pytest.mark.parametrize(
    ("local_spec", "transformer_engine_spec"),
    [
        ("mlp.experts.local_experts.1.linear_fc1.weight", "mlp.experts.linear_fc1.weight3"),
        ("mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.linear_fc2.weight3"),
    ],
)
def test_an_expert_is_found_by_its_number_within_its_rank_or_model(
    tmp_path: Path, local_spec: str, transformer_engine_spec: str
) -> None:
    table = table_for(read_hf_config(tiny_qwen3_moe(tmp_path)))
    found = table.find(f"decoder.layers.0.{local_spec}", first_layer=1, first_expert=2)
    assert found == table.find(f"decoder.layers.1.{transformer_engine_spec}")
    assert (found.layer, found.expert) == (1, 3)
    assert all(name.startswith("model.layers.1.mlp.experts.3.") for name in found.hf_names())
    with pytest.raises(ValueError, match="not a parameter of qwen3_moe"):
        table.find("decoder.layers.1.mlp.experts.linear_fc1.weight4")


def test_which_family_normalises_queries_and_keys_is_read_off_its_table(tmp_path: Path) -> None:
    has = {
        name: table_for(read_hf_config(tiny(tmp_path / name))).qk_norm
        for name, tiny in FAMILIES.items()
    }
    assert has == {"qwen3": True, "qwen3_moe": True, "llama": False}


def test_layers_are_listed_in_the_order_of_the_forward_pass() -> None:
    names = list(table_for(qwen3_config(tie_word_embeddings=False)).hf_shapes())
    assert (names[0], names[-2:]) == (
        "model.embed_tokens.weight",
        ["model.norm.weight", "lm_head.weight"],
    )
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers)


@pytest.mark.parametrize(
    ("local_spec", "transformer_engine_spec"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_a_parameter_is_found_by_the_names_of_both_layer_specs(
    local_spec: str, transformer_engine_spec: str
) -> None:
    table = table_for(qwen3_config())
    found = table.find(f"decoder.layers.0.{local_spec}", first_layer=2)
    assert found == table.find(f"decoder.layers.2.{transformer_engine_spec}")
    assert found.layer == 2


def test_the_copy_of_a_tied_head_is_loaded_from_the_embedding_and_not_exported() -> None:
    row = table_for(qwen3_config(tie_word_embeddings=True)).find("output_layer.weight").row
    assert (row.hf[0].name, row.exported) == ("model.embed_tokens.weight", False)
    row = table_for(qwen3_config(tie_word_embeddings=False)).find("output_layer.weight").row
    assert (row.hf[0].name, row.exported) == ("lm_head.weight", True)


@pytest.mark.parametrize("name", ["decoder.layers.3.mlp.linear_fc2.weight", "decoder.bias"])
def test_a_parameter_that_no_row_describes_is_an_error_with_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: not a parameter of qwen3"):
        table_for(qwen3_config()).find(name)


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' .* supported are qwen3"),
        (qwen3_config(attention_bias=True), "attention_bias: true .* is not supported"),
        (qwen3_config() | {"head_dim": None}, "config.json lacks `head_dim`"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_sentence(
    hf_config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        table_for(hf_config)


def test_tables_are_light_enough_for_the_configuration() -> None:
    code = "import sys, megasd.weights.tables; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "qwen3" in SUPPORTED_MODEL_TYPES
