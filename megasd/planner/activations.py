"""What the forward pass of one packed micro-batch leaves for its backward pass, and that needs.

Two lists of what is saved, by who computes: Megatron's local layers with our attention, on a CPU
(the tests count every saved tensor, and the peak of a backward pass), and Transformer Engine's
layers in bfloat16 (the tests count what its Python saves, on a CPU; peaks are not yet measured).
T is the tokens of the micro-batch, all sequences of one length; e the bytes of the model's dtype.
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
    longest: int  # tokens of its longest sequence
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

    @property
    def width(self) -> int:
        """Of this rank's part of a feed-forward, or of an expert."""
        model, parallel = self.model, self.parallel
        return model.ffn // (parallel.ranks_per_expert if model.experts else parallel.tensor)

    @property
    def wide_tokens(self) -> float:
        """Tokens that go through this rank's feed-forward."""
        return self.slots if self.model.experts else self.tokens


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
    return saved + cut.tokens * 5 * cut.width * e


def _local_experts(cut: Cut) -> float:
    model, e = cut.model, cut.dtype_bytes
    saved = _norm(cut, cut.rows, model.hidden) + cut.rows * model.hidden * e
    saved += cut.rows * _routing(model)
    # Tokens sorted by expert; as in a dense layer, once more before they are weighed.
    return saved + cut.slots * (model.hidden * e + 6 * cut.width * e + 4)


def _routing(model: Model) -> int:
    """Bytes per token: its experts, their probabilities and its places in the order of sending;
    of all experts whether it goes there, and with which probability."""
    return model.experts_per_token * (8 + 4 + 8) + model.experts * (1 + 4)


def _te_attention(cut: Cut) -> float:
    model, e, tp = cut.model, cut.dtype_bytes, cut.parallel.tensor
    heads, kv_heads, d = model.heads // tp, model.kv_heads // tp, model.head_dim
    # The norm is part of linear_qkv: its input, its output and a scale.
    saved = cut.rows * (2 * model.hidden * e + 4)
    if model.qk_norm:
        saved += _norm(cut, cut.tokens * (heads + kv_heads), d)
    # Rotated queries and keys, and values: a copy, linear_qkv's output is not kept.
    saved += cut.tokens * (heads + 2 * kv_heads) * d * e
    return saved + cut.tokens * heads * (d * e + 4)  # attention's output and log-sum-exp


def _te_mlp(cut: Cut) -> float:
    model, e = cut.model, cut.dtype_bytes
    saved = cut.rows * (2 * model.hidden * e + 4)
    # linear_fc1's output, and linear_fc2's input.
    return saved + cut.tokens * 3 * cut.width * e


def _te_experts(cut: Cut) -> float:
    model, e = cut.model, cut.dtype_bytes
    saved = _norm(cut, cut.rows, model.hidden) + cut.rows * model.hidden * e
    # Experts, their probabilities and twice the rows' places in the order of sending; of each
    # token the map of its rows.
    saved += cut.rows * (model.experts_per_token * (8 + 4 + 8) + (2 * model.experts + 1) * 4)
    return saved + cut.slots * (model.hidden * e + 3 * cut.width * e + 4)


def _positions(cut: Cut) -> int:
    """Those that have a rotation; Transformer Engine's are a power of 2 (policy/megatron/fixes)."""
    if cut.engine == "local":
        return cut.longest
    return max(1024, 1 << (cut.longest - 1).bit_length())


def forward_pass(cut: Cut) -> float:
    """An estimate of what a forward pass that saves nothing holds, at its widest: in a dense
    layer's feed-forward as measured, with experts above it."""
    widths = 5 if cut.engine == "local" else 3
    wide = cut.wide_tokens * widths * cut.width
    if cut.model.experts:
        wide += 2 * cut.slots * cut.model.hidden
    return 4 * layer_input(cut) + wide * cut.dtype_bytes


def layer_working(cut: Cut) -> float:
    """What lives beside all that a layer saved, at the fullest moment of its feed-forward."""
    backward = _backward_working(cut)
    return max(backward, _experts_forward(cut)) if cut.model.experts else backward


def _experts_forward(cut: Cut) -> float:
    """When the experts' outputs are sorted back: variables still hold what goes into the layer,
    its tokens as they were sent and as they came, and the outputs unsorted.

    The outputs of an expert that is cut are summed in float32, the dtype of its router.
    """
    e, hidden, ways = cut.dtype_bytes, cut.model.hidden, cut.parallel.ranks_per_expert
    sent = cut.rows * cut.model.experts_per_token * hidden
    came = cut.imbalance * sent if cut.parallel.expert > 1 else 0
    outputs = cut.slots * hidden
    working = layer_input(cut) + (sent + came + 2 * outputs) * e
    if ways > 1:
        working += (outputs if e < 4 else 0) * 4 + outputs / ways * 4
    return working


def _backward_working(cut: Cut) -> float:
    """The gradient of the layer's output, and what the fullest of these moments adds, in order:

    - linear_fc2: the gradients of its weight and of its input;
    - the activation: the gradients of its product and both halves, less the product, now freed;
    - linear_fc1: the gradients of its weight, output and input, less all that the activation
      saved; Transformer Engine gathers its input again under sequence parallelism.

    With experts the output's gradient is sorted first. On a CPU they then go one by one, each
    taken to have its even share of the tokens, and weigh their product in float32.
    """
    model, e, width, hidden = cut.model, cut.dtype_bytes, cut.width, cut.model.hidden
    tokens, weight, output = cut.wide_tokens, width * hidden, 0.0
    is_local = cut.engine == "local"
    moments = []
    if model.experts:
        output = tokens * hidden
        moments += [output]
        held = model.experts / cut.parallel.expert
        if is_local:
            tokens /= held
            moments += [tokens * width * 12 / e]
        else:
            weight *= held
    gathered = tokens * hidden if cut.parallel.sequence and not (is_local or model.experts) else 0
    activation = (5 if is_local else 3) * width
    moments += [
        tokens * width + weight,
        tokens * 2 * width,
        tokens * (2 * width + hidden - activation) + gathered + 2 * weight,
    ]
    return layer_input(cut) + (output + max(moments)) * e


def gather_buffer(cut: Cut) -> float:
    """Megatron's local layers gather into a buffer of their own, which is never given back."""
    if cut.engine != "local" or not cut.parallel.sequence:
        return 0.0
    return cut.tokens * cut.model.hidden * cut.dtype_bytes


def layers_going_backward(cut: Cut, *, recompute: bool) -> float:
    """What a stage needs for its layers' backward passes beside what it kept of them.

    With recomputation a layer's output is made again, and all that it saves; what it saves of its
    input is the input that was kept.
    """
    working = layer_working(cut)
    if not recompute:
        return working
    shares_input = cut.engine == "transformer_engine" or cut.dtype_bytes == 4
    output = 0.0 if shares_input else layer_input(cut)
    return working + layer_saved(cut) + output


def last_norm_going_backward(cut: Cut) -> float:
    """What it saved, and its gradients: four in float32 on a CPU; of its output and its input."""
    gradients = 4 * 4 if cut.engine == "local" else 2 * cut.dtype_bytes
    return last_norm_saved(cut) + cut.rows * cut.model.hidden * gradients


def kept_on_stage(cut: Cut, *, stage: int, recompute: bool, in_flight: int) -> float:
    """All that a stage saves of `in_flight` micro-batches, before the last norm and the head.

    With recomputation only the inputs of its layers, and the positions' rotations once; layers of
    Transformer Engine share them anyway.
    """
    per_layer = layer_input(cut) if recompute else layer_saved(cut)
    kept = per_layer * (cut.model.layers // cut.parallel.pipeline)
    if recompute or cut.engine == "transformer_engine":
        kept += _positions(cut) * cut.model.head_dim * 4
    if stage == 0:
        kept += cut.tokens * 8  # the ids, for the embedding
    return kept * in_flight
