"""What the forward pass of one packed micro-batch leaves for its backward pass, per layer.

Two lists of what is saved, by who computes: Megatron's local layers with our attention, on a CPU
(measured: the tests count every saved tensor), and Transformer Engine's layers on a GPU, in
bfloat16 (written from their code, and not yet compared with a GPU). T is the tokens of the
micro-batch, all sequences of one length; e the bytes of the model's dtype.
"""

from dataclasses import dataclass
from typing import Literal

from megasd.planner.model import Model
from megasd.policy.config import ParallelConfig

Engine = Literal["local", "transformer_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A micro-batch on one rank: its tokens, and how the model is cut around them."""

    model: Model
    parallel: ParallelConfig
    tokens: int
    longest: int  # tokens of its longest sequence: as many positions have a rotation
    dtype_bytes: int
    engine: Engine
    imbalance: float = 1.0  # of experts: tokens of the busiest rank over the mean

    @property
    def rows(self) -> int:
        """Tokens between tensor-parallel regions."""
        return self.tokens // (self.parallel.tensor if self.parallel.sequence else 1)

    @property
    def slots(self) -> float:
        """Tokens times experts that this rank's experts compute."""
        ranks = self.parallel.tensor // self.parallel.ranks_per_expert
        return self.imbalance * self.tokens * self.model.experts_per_token / ranks


def layer_input(cut: Cut) -> float:
    """The residual stream: with recomputation, all that is kept of a layer."""
    return cut.rows * cut.model.hidden * cut.dtype_bytes


def layer_saved(cut: Cut) -> float:
    """Everything that one layer saves."""
    attention = _local_attention if cut.engine == "local" else _te_attention
    if cut.model.experts:
        feed_forward = _local_experts if cut.engine == "local" else _te_experts
    else:
        feed_forward = _local_mlp if cut.engine == "local" else _te_mlp
    return attention(cut) + feed_forward(cut)


def last_norm_saved(cut: Cut) -> float:
    return _norm(cut, cut.rows, cut.model.hidden)


def _norm(cut: Cut, rows: float, size: int) -> float:
    """Local: input and normalised input in float32, and a scale. TE: the input and a scale."""
    if cut.engine == "local":
        return rows * (2 * size * 4 + 4)
    return rows * (size * cut.dtype_bytes + 4)


def _local_attention(cut: Cut) -> float:
    model, e, tp = cut.model, cut.dtype_bytes, cut.parallel.tensor
    heads, kv_heads, d = model.heads // tp, model.kv_heads // tp, model.head_dim
    saved = _norm(cut, cut.rows, model.hidden)
    saved += cut.rows * model.hidden * e  # input of linear_qkv
    if model.qk_norm:
        saved += _norm(cut, cut.tokens * (heads + kv_heads), d)
        if e == 4:  # the keys are no copy: all of linear_qkv's output stays
            saved += cut.tokens * (heads + kv_heads) * d * 4
    saved += cut.tokens * 4 * d * e  # cosine and sine, of queries and of keys
    # Packed queries, keys, values, output, log-sum-exp; where padding stands, there and back.
    saved += cut.tokens * ((2 * heads + 2 * kv_heads) * d * e + heads * 4 + 16)
    return saved + cut.tokens * heads * d * e  # input of linear_proj


def _local_mlp(cut: Cut) -> float:
    model, e = cut.model, cut.dtype_bytes
    saved = _norm(cut, cut.rows, model.hidden) + cut.rows * model.hidden * e
    # Output of linear_fc1, the activated gate, the other half, their product.
    return saved + cut.tokens * 5 * (model.ffn // cut.parallel.tensor) * e


def _local_experts(cut: Cut) -> float:
    model, e = cut.model, cut.dtype_bytes
    saved = _norm(cut, cut.rows, model.hidden) + cut.rows * model.hidden * e
    saved += cut.rows * _routing(model)
    width = model.ffn // cut.parallel.ranks_per_expert
    # Tokens sorted by expert; as in a dense layer, once more before they are weighed.
    return saved + cut.slots * (model.hidden * e + 6 * width * e + 4)


def _routing(model: Model) -> int:
    """Bytes per token: chosen ids, their probabilities, the map of who goes where."""
    return model.experts_per_token * (8 + 4 + 8) + model.experts * (4 + 1)


def _te_attention(cut: Cut) -> float:
    model, e, tp = cut.model, cut.dtype_bytes, cut.parallel.tensor
    heads, kv_heads, d = model.heads // tp, model.kv_heads // tp, model.head_dim
    # The norm is part of linear_qkv: its input, its output and a scale.
    saved = cut.rows * (2 * model.hidden * e + 4)
    if model.qk_norm:
        saved += _norm(cut, cut.tokens * (heads + kv_heads), d)
    # linear_qkv's output, of which the values are a part; rotated queries and keys.
    saved += cut.tokens * (heads + 2 * kv_heads) * d * e
    saved += cut.tokens * (heads + kv_heads) * d * e
    return saved + cut.tokens * heads * (d * e + 4)  # attention's output and log-sum-exp


def _te_mlp(cut: Cut) -> float:
    model, e = cut.model, cut.dtype_bytes
    saved = cut.rows * (2 * model.hidden * e + 4)
    # linear_fc1's output, and linear_fc2's input.
    return saved + cut.tokens * 3 * (model.ffn // cut.parallel.tensor) * e


def _te_experts(cut: Cut) -> float:
    model, e = cut.model, cut.dtype_bytes
    saved = _norm(cut, cut.rows, model.hidden) + cut.rows * model.hidden * e
    saved += cut.rows * _routing(model)
    width = model.ffn // cut.parallel.ranks_per_expert
    return saved + cut.slots * (model.hidden * e + 3 * width * e + 4)


def layer_working(cut: Cut) -> float:
    """An estimate of what else lives while one layer goes backward: the gradients in its widest
    place, and that of one weight before it is added to the buffer."""
    model, e = cut.model, cut.dtype_bytes
    if model.experts:
        width = model.ffn // cut.parallel.ranks_per_expert
        tokens, wide = cut.slots, 3 * width + 2 * model.hidden
        weight = 2 * width * model.hidden
    else:
        width = model.ffn // cut.parallel.tensor
        tokens, wide = cut.tokens, 3 * width + 2 * model.hidden
        weight = 2 * width * model.hidden
    return (tokens * wide + weight) * e


def saved_on_stage(cut: Cut, *, stage: int, recompute: bool, in_flight: int) -> float:
    """All that a stage saves of `in_flight` micro-batches, before the head.

    With recomputation only the inputs of its layers, and the positions' rotations once.
    """
    stages = cut.parallel.pipeline
    per_layer = layer_input(cut) if recompute else layer_saved(cut)
    saved = per_layer * (cut.model.layers // stages)
    if recompute:
        saved += cut.longest * cut.model.head_dim * 4
    if stage == 0:
        saved += cut.tokens * 8  # the ids, for the embedding
    if stage == stages - 1:
        saved += last_norm_saved(cut)
    return saved * in_flight
