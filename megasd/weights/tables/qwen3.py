"""Qwen3, dense: QK-norm, grouped queries, SwiGLU, no biases, tied or untied head."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.table import HFTensor, Row, Table, required

LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."
MLP, HF_MLP = LAYER + "mlp.", HF_LAYER + "mlp."


def table(hf_config: Mapping[str, Any]) -> Table:
    if required(hf_config, "attention_bias"):
        raise ValueError("model.path: attention_bias: true of config.json is not supported")
    hidden = required(hf_config, "hidden_size")
    vocabulary = (required(hf_config, "vocab_size"), hidden)
    tied = required(hf_config, "tie_word_embeddings")
    embedding = HFTensor("model.embed_tokens.weight", vocabulary)
    lm_head = HFTensor("lm_head.weight", vocabulary)
    return Table(
        model_type="qwen3",
        num_layers=required(hf_config, "num_hidden_layers"),
        first=(Row("vocabulary", ("embedding.word_embeddings.weight",), (embedding,)),),
        layers=(*_attention(hf_config, hidden), *_mlp(hf_config, hidden)),
        last=(
            Row(
                "replicated",
                ("decoder.final_layernorm.weight",),
                (HFTensor("model.norm.weight", (hidden,)),),
            ),
            Row(
                "vocabulary",
                ("output_layer.weight",),
                (embedding if tied else lm_head,),
                exported=not tied,
            ),
        ),
        copies={lm_head.name: embedding.name} if tied else {},
    )


def _attention(hf_config: Mapping[str, Any], hidden: int) -> tuple[Row, ...]:
    head = required(hf_config, "head_dim")
    queries = required(hf_config, "num_attention_heads") * head
    groups = required(hf_config, "num_key_value_heads")
    return (
        Row(
            "replicated",
            (LAYER + "input_layernorm.weight", ATTENTION + "linear_qkv.layer_norm_weight"),
            (HFTensor(HF_LAYER + "input_layernorm.weight", (hidden,)),),
        ),
        Row(
            "qkv",
            (ATTENTION + "linear_qkv.weight",),
            (
                HFTensor(HF_ATTENTION + "q_proj.weight", (queries, hidden)),
                HFTensor(HF_ATTENTION + "k_proj.weight", (groups * head, hidden)),
                HFTensor(HF_ATTENTION + "v_proj.weight", (groups * head, hidden)),
            ),
            groups=groups,
        ),
        Row(
            "replicated",
            (ATTENTION + "q_layernorm.weight",),
            (HFTensor(HF_ATTENTION + "q_norm.weight", (head,)),),
        ),
        Row(
            "replicated",
            (ATTENTION + "k_layernorm.weight",),
            (HFTensor(HF_ATTENTION + "k_norm.weight", (head,)),),
        ),
        Row(
            "row",
            (ATTENTION + "linear_proj.weight",),
            (HFTensor(HF_ATTENTION + "o_proj.weight", (hidden, queries)),),
        ),
    )


def _mlp(hf_config: Mapping[str, Any], hidden: int) -> tuple[Row, ...]:
    ffn = required(hf_config, "intermediate_size")
    return (
        Row(
            "replicated",
            (LAYER + "pre_mlp_layernorm.weight", MLP + "linear_fc1.layer_norm_weight"),
            (HFTensor(HF_LAYER + "post_attention_layernorm.weight", (hidden,)),),
        ),
        Row(
            "gated",
            (MLP + "linear_fc1.weight",),
            (
                HFTensor(HF_MLP + "gate_proj.weight", (ffn, hidden)),
                HFTensor(HF_MLP + "up_proj.weight", (ffn, hidden)),
            ),
        ),
        Row(
            "row",
            (MLP + "linear_fc2.weight",),
            (HFTensor(HF_MLP + "down_proj.weight", (hidden, ffn)),),
        ),
    )
