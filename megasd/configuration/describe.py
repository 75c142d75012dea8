"""What a run would do, as text: sizes of a step, and what each rank holds. For `--dry-run`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megasd.configuration.load import Config
from megasd.configuration.validate import context_length, longest_view
from megasd.policy.config import ParallelConfig

RANKS_SHOWN = 32  # of a larger world, only the first two ranks of each pipeline stage


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank in Megatron's order (tensor fastest, then data, then pipeline) and its share."""

    rank: int
    dp: int
    pp: int
    tp: int
    ep: int
    layers: range
    experts: range | None  # of each layer; None in a dense model
    vocabulary: range | None  # rows of embedding or head; None on a stage that has neither
    prompts: range | None  # of a step; None on the ranks of a replica that do not sample
    parameters: int


def plan(config: Config, world_size: int) -> str:
    """The plan of a configuration that `validate` found no fault with."""
    from megasd.weights.hf_folder import read_hf_config

    hf_config = read_hf_config(config.model.path)
    ranks = list(plan_ranks(config, hf_config, world_size))
    shown = ranks
    if world_size > RANKS_SHOWN:
        shown = [r for r in ranks if r.dp == 0 and r.tp < 2]
    tp = config.parallel.tensor
    heads = f"{hf_config['num_attention_heads'] // tp} / {hf_config['num_key_value_heads'] // tp}"
    of_experts = any(r.experts for r in ranks)
    header = (
        *("rank", "dp", "pp", "tp", *(["ep"] if of_experts else []), "layers", "vocabulary"),
        *("heads / kv", *(["experts"] if of_experts else []), "prompts", "parameters"),
    )
    rows = [
        (
            *map(str, (r.rank, r.dp, r.pp, r.tp, *([r.ep] if of_experts else []))),
            *(_span(r.layers), _span(r.vocabulary), heads),
            *([_span(r.experts)] if of_experts else []),
            *(_span(r.prompts), f"{r.parameters:,}"),
        )
        for r in shown
    ]
    more = [f"... and {world_size - len(shown)} more ranks"] if len(shown) < world_size else []
    return "\n".join([*_sizes(config, hf_config, world_size), "", *_table([header, *rows]), *more])


def plan_ranks(config: Config, hf_config: Mapping[str, Any], world_size: int) -> Iterator[RankPlan]:
    """Every rank's coordinates and share; parameters are counted exactly, padding included."""
    from megasd.weights.layout import rank_experts, stage_layers
    from megasd.weights.tables import table_for

    table = table_for(hf_config)
    tp_size, pp_size = config.parallel.tensor, config.parallel.pipeline
    ep_size, etp_size = config.parallel.expert, config.parallel.ranks_per_expert
    stage_size = world_size // pp_size
    share = config.rollout.prompts_per_step // (stage_size // tp_size)
    rows = math.ceil(hf_config["vocab_size"] / tp_size)
    parameters = [stage_parameters(config.parallel, hf_config, pp) for pp in range(pp_size)]
    for rank in range(world_size):
        pp, in_stage = divmod(rank, stage_size)
        dp, tp = divmod(in_stage, tp_size)
        ep = in_stage // etp_size % ep_size
        yield RankPlan(
            rank=rank,
            dp=dp,
            pp=pp,
            tp=tp,
            ep=ep,
            layers=stage_layers(table.num_layers, pp, pp_size),
            experts=rank_experts(table.num_experts, ep, ep_size) if table.num_experts else None,
            vocabulary=range(tp * rows, (tp + 1) * rows) if pp in (0, pp_size - 1) else None,
            prompts=range(dp * share, (dp + 1) * share) if tp == pp == 0 else None,
            parameters=parameters[pp],
        )


def stage_parameters(parallel: ParallelConfig, hf_config: Mapping[str, Any], stage: int) -> int:
    """Parameters of each rank of a pipeline stage: they all hold as many."""
    from megasd.weights.layout import Sizes, held_entries, local_shape
    from megasd.weights.tables import table_for

    sizes = Sizes(
        tp=parallel.tensor,
        pp=parallel.pipeline,
        ep=parallel.expert,
        etp=parallel.ranks_per_expert,
    )
    held = held_entries(table_for(hf_config), sizes, stage, ep_rank=0)
    return sum(math.prod(local_shape(entry.row, sizes.ways(entry.row))) for entry in held)


def _sizes(config: Config, hf_config: Mapping[str, Any], world_size: int) -> list[str]:
    parallel, rollout, optimizer = config.parallel, config.rollout, config.optimizer
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    rollouts = rollout.prompts_per_step * rollout.group_size
    updates = optimizer.minibatches_per_step
    sequence = config.data.max_prompt_tokens + rollout.max_response_tokens
    needs = config.algorithm.needs
    responses = "solutions read" if needs.solutions else "responses sampled"
    lines = [
        (
            "ranks",
            f"{world_size} = {replicas} data x {parallel.pipeline} pipeline x "
            f"{parallel.tensor} tensor{_expert_ranks(config, hf_config)}",
        ),
        (
            "step",
            f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {rollouts} {responses}, "
            f"mini-batches of {rollouts // updates}",
        ),
        ("run", f"{config.run.steps} steps, {config.run.steps * updates} optimizer steps"),
        (
            "tokens",
            f"at most {rollouts * sequence:,} per step, {sequence:,} per sequence, "
            f"in a context of {context_length(config, hf_config):,}",
        ),
        (
            "micro-batch",
            f"{optimizer.max_tokens_per_microbatch:,} tokens, of whole sequences up to "
            f"{longest_view(config, hf_config):,}",
        ),
    ]
    if needs.teachers:
        lines.append(("teacher", _teacher(config)))
    return [f"{name + ':':13}{text}" for name, text in lines]


def _expert_ranks(config: Config, hf_config: Mapping[str, Any]) -> str:
    from megasd.weights.tables import table_for

    parallel = config.parallel
    if not table_for(hf_config).num_experts:
        return ""
    return f"; experts over {parallel.expert} expert x {parallel.ranks_per_expert} expert-tensor"


def _teacher(config: Config) -> str:
    roles = config.algorithm.needs.teachers
    sources = " and ".join(config.context.sources) or "plain prompt"
    reads = [f"{config.teacher.weights} weights read the {sources}"] if "teacher" in roles else []
    wrong = sum(role.startswith("wrong[") for role in roles)
    if wrong:
        reads.append(f"and {wrong} wrong sibling{'s' if wrong > 1 else ''}, one by one")
    if "reference" in roles:
        reads.append("the initial weights read the plain prompt")
    return ", ".join(reads)


def _span(values: range | None) -> str:
    return f"{values.start}-{values.stop - 1}" if values else "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
