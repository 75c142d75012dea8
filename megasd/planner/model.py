"""The sizes of a model, as the planner's formulas name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megasd.weights.tables import table_for
from megasd.weights.tables.table import Table


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity: results are kept by it
class Model:
    """Of a Hugging Face config.json."""

    hf_config: Mapping[str, Any]
    table: Table
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # of a dense layer, or of one expert
    vocabulary: int
    experts: int  # of a layer; 0 in a dense model
    experts_per_token: int  # 1 in a dense model
    qk_norm: bool

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> "Model":
        table = table_for(hf_config)
        heads, hidden = hf_config["num_attention_heads"], hf_config["hidden_size"]
        experts = table.num_experts
        return cls(
            hf_config=hf_config,
            table=table,
            layers=table.num_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=hf_config["num_key_value_heads"],
            head_dim=hf_config.get("head_dim") or hidden // heads,
            ffn=hf_config["moe_intermediate_size" if experts else "intermediate_size"],
            vocabulary=hf_config["vocab_size"],
            experts=experts,
            experts_per_token=hf_config["num_experts_per_tok"] if experts else 1,
            qk_norm=table.qk_norm,
        )

    @property
    def attention_weights(self) -> int:
        """Matrix elements of one layer's attention."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def ffn_weights(self) -> int:
        """Matrix elements of one layer's feed-forward, or of one expert."""
        return 3 * self.hidden * self.ffn

    @property
    def active_weights(self) -> int:
        """Matrix elements that a token meets in one layer."""
        router = self.hidden * self.experts
        return self.attention_weights + router + self.experts_per_token * self.ffn_weights

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary
