"""What a run would do, as text: sizes of a step, and what each rank holds. For `--dry-run`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megasd.config import Config
from megasd.validate import context_length, longest_view

RANKS_SHOWN = 32  # of a larger world, only the first two ranks of each pipeline stage


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank in Megatron's order (tensor fastest, then data, then pipeline) and its share."""

    rank: int
    dp: int
    pp: int
    tp: int
    layers: range
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
    header = (
        "rank",
        "dp",
        "pp",
        "tp",
        "layers",
        "vocabulary",
        "heads / kv",
        "prompts",
        "parameters",
    )
    rows = [
        (
            *map(str, (r.rank, r.dp, r.pp, r.tp)),
            _span(r.layers),
            _span(r.vocabulary),
            heads,
            _span(r.prompts),
            f"{r.parameters:,}",
        )
        for r in shown
    ]
    more = [f"... and {world_size - len(shown)} more ranks"] if len(shown) < world_size else []
    return "\n".join([*_sizes(config, hf_config, world_size), "", *_table([header, *rows]), *more])


def plan_ranks(config: Config, hf_config: Mapping[str, Any], world_size: int) -> Iterator[RankPlan]:
    """Every rank's coordinates and share; parameters are counted exactly, padding included."""
    from megasd.weights.layout import stage_layers

    tp_size, pp_size = config.parallel.tensor, config.parallel.pipeline
    dp_size = world_size // (tp_size * pp_size)
    share = config.rollout.prompts_per_step // dp_size
    rows = math.ceil(hf_config["vocab_size"] / tp_size)
    stages = [stage_layers(hf_config["num_hidden_layers"], pp, pp_size) for pp in range(pp_size)]
    parameters = [_parameters(hf_config, tp_size, pp, pp_size) for pp in range(pp_size)]
    for rank in range(world_size):
        tp, dp, pp = rank % tp_size, rank // tp_size % dp_size, rank // (tp_size * dp_size)
        yield RankPlan(
            rank=rank,
            dp=dp,
            pp=pp,
            tp=tp,
            layers=stages[pp],
            vocabulary=range(tp * rows, (tp + 1) * rows) if pp in (0, pp_size - 1) else None,
            prompts=range(dp * share, (dp + 1) * share) if tp == pp == 0 else None,
            parameters=parameters[pp],
        )


def _parameters(hf_config: Mapping[str, Any], tp_size: int, pp: int, pp_size: int) -> int:
    """Parameters of one rank of a pipeline stage."""
    from megasd.weights.layout import local_shape, stage_layers
    from megasd.weights.tables import table_for

    table = table_for(hf_config)
    held = list(table.layers) * len(stage_layers(table.num_layers, pp, pp_size))
    if pp == 0:
        held += table.first
    if pp == pp_size - 1:
        # A tied head is the embedding itself, unless that lies on another stage.
        held += [row for row in table.last if row.exported or pp > 0]
    return sum(math.prod(local_shape(row, tp_size)) for row in held)


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
            f"{parallel.tensor} tensor",
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
