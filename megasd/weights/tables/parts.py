"""The rows that families share: a family's file says which it has."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables.table import HFTensor, Row, Table, required

LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."
MLP, HF_MLP = LAYER + "mlp.", HF_LAYER + "mlp."
LOCAL_EXPERT, HF_EXPERT = MLP + "experts.local_experts.{expert}.", HF_MLP + "experts.{expert}."


def decoder(hf_config: Mapping[str, Any], layers: tuple[Row, ...]) -> Table:
    """Embedding, layers, final norm, and a head that is tied to the embedding or not."""
    hidden = required(hf_config, "hidden_size")
    vocabulary = (required(hf_config, "vocab_size"), hidden)
    tied = required(hf_config, "tie_word_embeddings")
    embedding = HFTensor("model.embed_tokens.weight", vocabulary)
    lm_head = HFTensor("lm_head.weight", vocabulary)
    head = embedding if tied else lm_head
    return Table(
        model_type=hf_config["model_type"],
        num_layers=required(hf_config, "num_hidden_layers"),
        first=(Row("vocabulary", ("embedding.word_embeddings.weight",), (embedding,)),),
        layers=layers,
        last=(
            _norm(("decoder.final_layernorm.weight",), "model.norm.weight", hidden),
            Row("vocabulary", ("output_layer.weight",), (head,), exported=not tied),
        ),
        copies={lm_head.name: embedding.name} if tied else {},
    )


def attention(hf_config: Mapping[str, Any], *, qk_norm: bool) -> tuple[Row, ...]:
    """Grouped-query attention without biases, after its norm."""
    hidden, heads = required(hf_config, "hidden_size"), required(hf_config, "num_attention_heads")
    head_dim = hf_config.get("head_dim") or hidden // heads
    queries = heads * head_dim
    groups = required(hf_config, "num_key_value_heads")
    qkv = (
        HFTensor(HF_ATTENTION + "q_proj.weight", (queries, hidden)),
        HFTensor(HF_ATTENTION + "k_proj.weight", (groups * head_dim, hidden)),
        HFTensor(HF_ATTENTION + "v_proj.weight", (groups * head_dim, hidden)),
    )
    out = HFTensor(HF_ATTENTION + "o_proj.weight", (hidden, queries))
    before = (LAYER + "input_layernorm.weight", ATTENTION + "linear_qkv.layer_norm_weight")
    norms = ("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")
    return (
        _norm(before, HF_LAYER + "input_layernorm.weight", hidden),
        Row("qkv", (ATTENTION + "linear_qkv.weight",), qkv, groups=groups),
        *(
            _norm((f"{ATTENTION}{ours}.weight",), f"{HF_ATTENTION}{theirs}.weight", head_dim)
            for ours, theirs in norms
            if qk_norm
        ),
        Row("row", (ATTENTION + "linear_proj.weight",), (out,)),
    )


def gated_mlp(hf_config: Mapping[str, Any]) -> tuple[Row, ...]:
    """SwiGLU without biases, after its norm."""
    hidden, ffn = required(hf_config, "hidden_size"), required(hf_config, "intermediate_size")
    before = (LAYER + "pre_mlp_layernorm.weight", MLP + "linear_fc1.layer_norm_weight")
    return (
        _norm(before, HF_LAYER + "post_attention_layernorm.weight", hidden),
        Row("gated", (MLP + "linear_fc1.weight",), _gate_and_up(HF_MLP, ffn, hidden)),
        Row("row", (MLP + "linear_fc2.weight",), (_down(HF_MLP, ffn, hidden),)),
    )


def experts(hf_config: Mapping[str, Any]) -> tuple[Row, ...]:
    """A router over SwiGLU experts, after their norm. No shared expert."""
    hidden, ffn = required(hf_config, "hidden_size"), required(hf_config, "moe_intermediate_size")
    # transformers 5 writes the second name; config.json of published models has the first.
    count = hf_config.get("num_local_experts") or required(hf_config, "num_experts")
    router = HFTensor(HF_MLP + "gate.weight", (count, hidden))
    fc1 = (LOCAL_EXPERT + "linear_fc1.weight", MLP + "experts.linear_fc1.weight{expert}")
    fc2 = (LOCAL_EXPERT + "linear_fc2.weight", MLP + "experts.linear_fc2.weight{expert}")
    before = (LAYER + "pre_mlp_layernorm.weight",)  # Transformer Engine does not fuse this one
    return (
        _norm(before, HF_LAYER + "post_attention_layernorm.weight", hidden),
        Row("replicated", (MLP + "router.weight",), (router,)),
        Row("gated", fc1, _gate_and_up(HF_EXPERT, ffn, hidden), experts=count),
        Row("row", fc2, (_down(HF_EXPERT, ffn, hidden),), experts=count),
    )


def _norm(megatron: tuple[str, ...], hf: str, size: int) -> Row:
    return Row("replicated", megatron, (HFTensor(hf, (size,)),))


def _gate_and_up(where: str, ffn: int, hidden: int) -> tuple[HFTensor, HFTensor]:
    gate = HFTensor(where + "gate_proj.weight", (ffn, hidden))
    return gate, HFTensor(where + "up_proj.weight", (ffn, hidden))


def _down(where: str, ffn: int, hidden: int) -> HFTensor:
    return HFTensor(where + "down_proj.weight", (hidden, ffn))
