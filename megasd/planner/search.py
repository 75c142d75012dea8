"""The layouts that a configuration could run in: those that fit and cost least first.

What varies: tensor, pipeline and expert parallelism, recomputation, tokens of a micro-batch, GPUs
of a colocated vLLM engine and its share of their memory, or engines on nodes of their own. Nothing
is suggested that the checks of the policy and of the engines refuse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megasd.configuration.load import Config
from megasd.configuration.validate import (
    check_batch,
    check_lengths,
    check_numbers,
    longest_rollout,
    longest_view,
)
from megasd.planner.duration import Duration, duration
from megasd.planner.hardware import GPUS_PER_NODE
from megasd.planner.memory import Memory, Scenario, memory
from megasd.policy.checks import check_cut, check_experts, check_layout
from megasd.rollout.checks import check_engines

TENSOR = (1, 2, 4, 8)  # more would leave the node
PIPELINE = (1, 2, 3, 4, 6, 8, 12, 16)
EXPERT = (1, 2, 4, 8, 16, 32, 64, 128)
ENGINE_TENSOR = (1, 2, 4, 8)  # an engine does not leave its node
MICROBATCHES = (1, 2, 4)  # longest sequences in one
SHARES = tuple(round(0.05 * n, 2) for n in range(18, 1, -1))  # of a GPU's memory, for vLLM


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to run, as the overrides that lead there from the configuration."""

    overrides: dict[str, Any]
    config: Config
    memory: Memory
    duration: Duration
    gpus: int  # those of engines on nodes of their own among them


def faults(scenario: Scenario) -> list[str]:
    """Why this scenario cannot run at all, whatever it holds; sentences as in validate.py."""
    config, count, hf_config = scenario.config, scenario.machine.count, scenario.model.hf_config
    if numbers := check_numbers(config):
        return numbers
    found = [
        *check_batch(config, count),
        *check_layout(config.parallel, world_size=count, device="cuda"),
        *check_cut(config.parallel, hf_config),
        *check_experts(config.parallel, hf_config),
        *check_lengths(config, hf_config),
        *_engine_faults(scenario),
    ]
    if scenario.teacher_model is not None:
        found += [
            fault.replace("model.path", "teacher.path")
            for fault in check_cut(config.parallel, scenario.teacher_model.hf_config)
        ]
    return found


def _engine_faults(scenario: Scenario) -> list[str]:
    config, count = scenario.config, scenario.machine.count
    return check_engines(
        config.rollout,
        world_size=count,
        ranks_per_stage=max(1, count // config.parallel.pipeline),
        is_cuda=True,
        dtype=config.model.dtype,
        hf_config=scenario.model.hf_config,
        max_tokens=longest_rollout(config),
        needs_vllm=False,  # a plan is not made on the machine that will run it
    )


def best_layouts(scenario: Scenario, *, most: int = 5) -> list[Layout]:
    """The `most` that fit and take the fewest seconds times GPUs, one for each way to cut the
    policy: with engines beside it, else beside what is left of it when its memory is lent to them,
    else those in FP8; and with engines on nodes of their own."""
    config, vllm = scenario.config, scenario.config.rollout.vllm
    found = _search(scenario, config)
    servers: list[Layout] = []
    if scenario.has_vllm_here:
        lent = replace(vllm, park_trainer=True)
        if not found and not vllm.park_trainer:
            found = _search(scenario, _with_vllm(config, lent))
        in_fp8 = not found and vllm.quantization == "none"
        if in_fp8:
            found = _search(scenario, _with_vllm(config, replace(lent, quantization="fp8")))
        servers = sorted(_with_servers(scenario, most), key=_rank(scenario))
        if in_fp8:  # which samples from other weights: what does not is shown, whatever it costs
            most -= min(1, len(servers))
            return sorted(found, key=_rank(scenario))[:most] + servers[:1]
    return sorted(found + servers, key=_rank(scenario))[:most]


def _with_servers(scenario: Scenario, most: int) -> list[Layout]:
    """The trainer has all GPUs, to which come whole nodes of engines: the quickest trainers, each
    with the engines that suit it. Its memory does not depend on them."""
    starts = list(_servers(scenario))
    if not starts:
        return []
    found = []
    for layout in sorted(_search(scenario, starts[-1]), key=_rank(scenario))[:most]:
        configs = [replace(layout.config, rollout=start.rollout) for start in starts]
        tried = [_layout(scenario, config) for config in configs]
        found.append(min(filter(None, tried), key=_rank(scenario)))
    return found


def _servers(scenario: Scenario) -> Iterator[Config]:
    config, nodes = scenario.config, scenario.machine.nodes
    for more in sorted({max(1, nodes * quarters // 4) for quarters in (1, 2, 4)}):
        for tensor in ENGINE_TENSOR:
            vllm = replace(
                config.rollout.vllm,
                placement="server",
                park_trainer=False,
                engines=more * GPUS_PER_NODE // tensor,
                tensor=tensor,
                expert_parallel=bool(scenario.model.experts) and tensor > 1,
                gpu_memory_utilization=0.9,
            )
            server = _with_vllm(config, vllm)
            if not _engine_faults(replace(scenario, config=server)):
                yield server


def _search(scenario: Scenario, start: Config) -> list[Layout]:
    """`start` is where the search begins, the scenario's configuration what overrides change."""
    best: dict[Any, Layout] = {}
    rank = _rank(scenario)
    for config in _trainers(replace(scenario, config=start)):
        candidate = replace(scenario, config=config)
        if faults(candidate):
            continue
        for engines in _engines(candidate):
            layout = _layout(scenario, engines)
            key = engines.parallel
            if layout is not None and (key not in best or rank(layout) < rank(best[key])):
                best[key] = layout
    return list(best.values())


def _layout(scenario: Scenario, config: Config) -> Layout | None:
    """None where it does not fit."""
    tried = replace(scenario, config=config)
    held = memory(tried)
    if not held.fits:
        return None
    return Layout(
        overrides=_overrides(scenario.config, config),
        config=config,
        memory=held,
        duration=duration(tried, held, with_sync=False),
        gpus=tried.gpus,
    )


def _rank(scenario: Scenario) -> Callable[[Layout], tuple[float, int, int]]:
    """Less of all GPUs' time; as little, then nearer to the configuration; then smaller."""

    def rank(layout: Layout) -> tuple[float, int, int]:
        cost = layout.duration.total * layout.gpus / scenario.machine.count
        return round(cost, 1), len(layout.overrides), layout.memory.peak

    return rank


def _trainers(scenario: Scenario) -> Iterator[Config]:
    config, count, model = scenario.config, scenario.machine.count, scenario.model
    longest = longest_view(config, model.hf_config)
    budgets = {longest * n for n in MICROBATCHES} | {config.optimizer.max_tokens_per_microbatch}
    layouts = [
        replace(
            config.parallel,
            tensor=tensor,
            pipeline=pipeline,
            sequence=tensor > 1,
            expert=expert,
            expert_tensor=None if expert > 1 or not model.experts or tensor == 1 else 1,
        )
        for tensor in TENSOR
        for pipeline in PIPELINE
        for expert in (EXPERT if model.experts else (1,))
        if count % (tensor * pipeline) == 0 and count // pipeline % expert == 0
    ]
    for parallel in layouts:
        for recompute in ("none", "full"):
            for budget in budgets:
                yield replace(
                    config,
                    parallel=parallel,
                    model=replace(config.model, recompute=recompute),
                    optimizer=replace(config.optimizer, max_tokens_per_microbatch=budget),
                )


def _engines(scenario: Scenario) -> Iterator[Config]:
    """Every size of a colocated engine, with the largest share of memory that fits beside it."""
    config = scenario.config
    if not scenario.has_vllm_here:
        yield config
        return
    for tensor in ENGINE_TENSOR:
        shares_experts = bool(scenario.model.experts) and tensor > 1
        vllm = replace(config.rollout.vllm, tensor=tensor, expert_parallel=shares_experts)
        sized = _with_vllm(config, vllm)
        if faults(replace(scenario, config=sized)):
            continue
        empty = _with_vllm(config, replace(vllm, gpu_memory_utilization=0.0, kv_cache_gib=0.0))
        held = memory(replace(scenario, config=empty))
        room = held.capacity - held.standing - held.margin + held.parked
        share = next((share for share in SHARES if share * held.capacity <= room), None)
        if share is not None:
            yield _with_vllm(config, replace(vllm, gpu_memory_utilization=share))


def _with_vllm(config: Config, vllm: Any) -> Config:
    return replace(config, rollout=replace(config.rollout, vllm=vllm))


def _overrides(old: Config, new: Config) -> dict[str, Any]:
    """The keys of a layout at which two configurations differ."""
    found: dict[str, Any] = {}
    for key, one, other in (
        ("parallel", old.parallel, new.parallel),
        ("model", old.model, new.model),
        ("optimizer", old.optimizer, new.optimizer),
        ("rollout.vllm", old.rollout.vllm, new.rollout.vllm),
    ):
        for name in vars(other):
            if getattr(one, name) != getattr(other, name):
                found[f"{key}.{name}"] = getattr(other, name)
    return found
