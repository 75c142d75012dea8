"""The table of a family names exactly the tensors that transformers has, and is light."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megasd.weights.tables import SUPPORTED_MODEL_TYPES, table_for


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
def test_names_and_shapes_are_those_of_transformers(tied: bool) -> None:
    hf_config = qwen3_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**hf_config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert table_for(hf_config).hf_shapes() == expected


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
    assert found[1] == 2


def test_the_copy_of_a_tied_head_is_loaded_from_the_embedding_and_not_exported() -> None:
    row, _ = table_for(qwen3_config(tie_word_embeddings=True)).find("output_layer.weight")
    assert (row.hf[0].name, row.exported) == ("model.embed_tokens.weight", False)
    row, _ = table_for(qwen3_config(tie_word_embeddings=False)).find("output_layer.weight")
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
