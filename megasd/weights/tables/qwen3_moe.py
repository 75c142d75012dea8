"""Qwen3 with experts in every layer: as Qwen3, with a router over small SwiGLU experts."""

from collections.abc import Mapping
from typing import Any

from megasd.weights.tables import qwen3
from megasd.weights.tables.keys import DECODER, FLAG, PLAIN, SIZE, Keys
from megasd.weights.tables.parts import attention, decoder, experts
from megasd.weights.tables.table import Table

KEYS = Keys(
    required={
        **DECODER,
        "moe_intermediate_size": SIZE,
        "num_experts_per_tok": SIZE,
    },
    # Published models have the first name of the number of experts, transformers 5 the second.
    optional={
        "head_dim": SIZE,
        "num_experts": SIZE,
        "num_local_experts": SIZE,
        "norm_topk_prob": FLAG,
    },
    structure={
        **qwen3.KEYS.structure,
        "decoder_sparse_step": (1,),
        "mlp_only_layers": (),
        "shared_expert_intermediate_size": (0,),
    },
    neutral=PLAIN,
    # No load balancing, whatever its weight: policy/megatron/build.py says why.
    ignored=qwen3.KEYS.ignored | {"output_router_logits", "router_aux_loss_coef"},
)


def table(hf_config: Mapping[str, Any]) -> Table:
    return decoder(hf_config, (*attention(hf_config, qk_norm=True), *experts(hf_config)))
