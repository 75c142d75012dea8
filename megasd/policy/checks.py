"""Whether a model can be cut as `parallel` asks: arithmetic only.

Sentences as in megasd/configuration/validate.py.
"""

from collections.abc import Mapping
from typing import Any

from megasd.policy.config import FP8Config, ModelConfig, ParallelConfig
from megasd.weights.tables import table_for

SCORES_GIB = 64  # attention scores beyond this fit no GPU beside a model
UNEVEN = (
    "parallel.expert_tensor: the ranks of one expert would gather unequal numbers of tokens, which "
    "gloo on a CPU cannot; set it to 1, or parallel.expert to 1 and it to parallel.tensor"
)


def gathers_unevenly(parallel: ParallelConfig) -> bool:
    """True if the ranks that share an expert may hold different numbers of its tokens."""
    shares = parallel.ranks_per_expert
    return shares > 1 and (parallel.expert > 1 or parallel.tensor % shares != 0)


def ranks_per_replica(parallel: ParallelConfig) -> int:
    """Ranks that hold the dense part of the model once."""
    # A product below 1 has its own sentence, from the checks of ranges.
    return max(1, parallel.tensor * parallel.pipeline)


def check_layout(parallel: ParallelConfig, *, world_size: int, device: str) -> list[str]:
    """Whether so many ranks can be arranged as asked."""
    faults = []
    ranks = ranks_per_replica(parallel)
    if world_size % ranks:
        faults.append(
            f"parallel.tensor: {parallel.tensor} x parallel.pipeline = {parallel.pipeline} makes "
            f"{ranks} ranks per replica, which do not divide the world size {world_size}; "
            f"start a multiple of {ranks} processes or change one of the two"
        )
    if parallel.sequence and parallel.tensor == 1:
        faults.append(
            "parallel.sequence: needs parallel.tensor above 1; set it to false or raise "
            "parallel.tensor"
        )
    ranks_of_stage, shares = world_size // max(1, parallel.pipeline), parallel.ranks_per_expert
    if world_size % ranks == 0 and ranks_of_stage % max(1, parallel.expert * shares):
        faults.append(
            f"parallel.expert: {parallel.expert} x parallel.expert_tensor = {shares} does not "
            f"divide the {ranks_of_stage} ranks of a pipeline stage; change one of the two"
        )
    if device == "cpu" and gathers_unevenly(parallel):
        faults.append(UNEVEN)
    return faults


def check_layers(
    model: ModelConfig,
    parallel: ParallelConfig,
    hf_config: Mapping[str, Any] | None,
    *,
    device: str,
    tokens: int,
    longest: int,
) -> list[str]:
    """Whether the layers run on `device`, with `tokens` of which one sequence may have `longest`.

    Transformer Engine has no attention for float32 but the one that keeps every score of each
    pair of tokens: counted are those that a stage keeps for its backward pass.
    """
    from megasd.policy.backend import device_type, is_transformer_engine_installed

    device = device_type(device)
    if device == "cpu" and model.layers == "transformer_engine":
        return ["model.layers: transformer_engine runs on GPUs only; set it to auto or local"]
    takes_it = model.layers == "transformer_engine" or (
        model.layers == "auto" and is_transformer_engine_installed()
    )
    if hf_config is None or device == "cpu" or model.dtype != "float32" or not takes_it:
        return []
    heads = hf_config["num_attention_heads"] // max(1, parallel.tensor)
    layers = hf_config["num_hidden_layers"] // max(1, parallel.pipeline)
    kept = 1 if model.recompute == "full" else layers
    scores = 4 * heads * tokens * longest * kept / 2**30
    if scores <= SCORES_GIB:
        return []
    return [
        f"model.layers: Transformer Engine keeps {scores:.0f} GiB of attention scores in float32 "
        f"(optimizer.max_tokens_per_microbatch = {tokens}, sequences of up to {longest}); set "
        "model.dtype to bfloat16, or model.layers to local"
    ]


def check_fp8(
    model: ModelConfig,
    parallel: ParallelConfig,
    hf_config: Mapping[str, Any] | None,
    *,
    device: str,
) -> list[str]:
    """Whether the passes of `model.fp8` can run; what only the card knows, backend.start asks."""
    from megasd.policy.backend import device_type

    if model.fp8 is None:
        return []
    faults = _of_recipe(model.fp8)
    if device_type(device) == "cpu":
        faults.append("model.fp8: float8 layers run on GPUs only; set it to null")
    if model.layers == "local":
        faults.append(
            "model.fp8: float8 layers are Transformer Engine's; set model.layers to auto, or "
            "model.fp8 to null"
        )
    if model.dtype != "bfloat16":
        faults.append(
            f"model.fp8: what is not float8 is bfloat16, and model.dtype is {model.dtype}; set it "
            "to bfloat16, or model.fp8 to null"
        )
    return faults + check_fp8_cut(model.fp8, parallel, hf_config)


def check_fp8_cut(
    fp8: FP8Config | None, parallel: ParallelConfig, hf_config: Mapping[str, Any] | None
) -> list[str]:
    """Whether the layers of a model, cut as asked, are ones that can be in float8."""
    if fp8 is None or hf_config is None:
        return []
    kept, layers = fp8.first_last_bf16, hf_config["num_hidden_layers"]
    if 2 * kept < layers and kept <= layers // max(1, parallel.pipeline):
        return _widths(fp8, parallel, hf_config)
    return [
        f"model.fp8.first_last_bf16: {kept} layers at either end of the {layers} of model.path "
        "leave none in float8, or are more than a pipeline stage has; lower it",
        *_widths(fp8, parallel, hf_config),
    ]


def _of_recipe(fp8: FP8Config) -> list[str]:
    faults = [
        f"model.fp8.{key}: {value} is out of range; set it to 0 or more"
        for key, value in (
            ("first_last_bf16", fp8.first_last_bf16),
            ("meter_every", fp8.meter_every),
        )
        if value < 0
    ]
    if not (fp8.train or fp8.score):
        faults.append(
            "model.fp8.train: nothing is in float8, for model.fp8.score is false too; set one to "
            "true, or model.fp8 to null"
        )
    if fp8.recipe != "delayed":
        return faults
    forbidden = {
        "score": (fp8.score, "false", "would scale by what teachers read, and the update by that"),
        "meter_every": (fp8.meter_every, "0", "would scale by what the meter reads"),
        "first_last_bf16": (fp8.first_last_bf16, "0", "cannot leave layers out in Megatron"),
    }
    return faults + [
        f"model.fp8.{key}: delayed scaling {why}; set it to {off}, or model.fp8.recipe to "
        "blockwise or tensorwise"
        for key, (is_on, off, why) in forbidden.items()
        if is_on
    ]


def _widths(fp8: FP8Config, parallel: ParallelConfig, hf_config: Mapping[str, Any]) -> list[str]:
    """Each side of a rank's matrices is one that GEMMs in float8 add up along."""
    from megasd.policy.float8 import ALIGNED
    from megasd.weights.fp8 import BLOCK

    tensor, heads = max(1, parallel.tensor), hf_config["num_attention_heads"]
    head_dim = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    expert = table_for(hf_config).num_experts > 0
    name = "moe_intermediate_size" if expert else "intermediate_size"
    ways = parallel.ranks_per_expert if expert else tensor
    gathers_blocks = fp8.recipe == "blockwise" and parallel.sequence and tensor > 1
    widths = {
        "hidden_size": (hf_config["hidden_size"], BLOCK if gathers_blocks else ALIGNED),
        "queries": (heads * head_dim / tensor, ALIGNED),
        "keys": (hf_config["num_key_value_heads"] * head_dim / tensor, ALIGNED),
        name: (hf_config[name] / max(1, ways), ALIGNED),
    }
    return [
        f"model.fp8: of model.path's {what} a rank has {width:g}, which float8 layers need as a "
        f"multiple of {multiple}; change parallel.tensor, or set model.fp8 to null"
        for what, (width, multiple) in widths.items()
        if width % multiple
    ]


def check_experts(parallel: ParallelConfig, hf_config: Mapping[str, Any] | None) -> list[str]:
    """Whether the policy has the experts that `parallel` would cut."""
    if hf_config is None or table_for(hf_config).num_experts:
        return []
    asked = {"expert": parallel.expert > 1, "expert_tensor": parallel.expert_tensor is not None}
    return [
        f"parallel.{key}: cuts experts, and model.path ({hf_config['model_type']}) has none; "
        "leave it out"
        for key, is_set in asked.items()
        if is_set
    ]


def check_cut(parallel: ParallelConfig, hf_config: Mapping[str, Any] | None) -> list[str]:
    """Whether layers, heads, widths and experts of a model can be cut as asked."""
    if hf_config is None:
        return []
    experts = table_for(hf_config).num_experts
    cuts = [
        ("pipeline", parallel.pipeline, "num_hidden_layers", "layers"),
        ("tensor", parallel.tensor, "num_attention_heads", "attention heads"),
        ("tensor", parallel.tensor, "num_key_value_heads", "key-value heads"),
    ]
    faults = []
    if experts:
        shares = parallel.ranks_per_expert
        cuts.append(("expert", parallel.expert, "num_experts", "experts"))
        cuts.append(("expert_tensor", shares, "moe_intermediate_size", "columns of an expert"))
        faults = _of_experts(parallel, hf_config)
    else:
        cuts.append(("tensor", parallel.tensor, "intermediate_size", "feed-forward columns"))
    sizes = {**hf_config, "num_experts": experts}  # config.json may have another name for it
    return faults + [
        f"parallel.{key}: {ways} does not divide the {sizes[name]} {what} ({name}) of model.path; "
        f"choose a divisor of {sizes[name]}"
        for key, ways, name, what in cuts
        if sizes[name] % max(1, ways)
    ]


def _of_experts(parallel: ParallelConfig, hf_config: Mapping[str, Any]) -> list[str]:
    faults = []
    if parallel.tensor > 1 and not parallel.sequence:
        faults.append(
            "parallel.sequence: a model with experts needs it when parallel.tensor is above 1; "
            "set it to true"
        )
    per_token = hf_config.get("num_experts_per_tok")
    if per_token is None:
        faults.append("model.path: config.json lacks `num_experts_per_tok`; add it")
    elif per_token == 1 and hf_config.get("norm_topk_prob"):
        faults.append(
            "model.path: one expert per token whose probability is normalised to 1 leaves the "
            "router without a gradient; choose a model with num_experts_per_tok above 1"
        )
    return faults
