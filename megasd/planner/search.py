"""The layouts that a configuration could run in: those that fit and cost least first.

What varies: tensor, pipeline and expert parallelism, recomputation, tokens of a micro-batch, GPUs
of a colocated vLLM engine and its share of their memory, or engines on nodes of their own. Nothing
is suggested that the checks of the policy and of the engines refuse.
"""

import itertools
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
from megasd.planner.decoding import rollout_seconds
from megasd.planner.duration import Duration, duration
from megasd.planner.hardware import GPUS_PER_NODE
from megasd.planner.memory import Memory, Scenario, cache_room, memory
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
    if numbers := check_numbers(scenario.config):
        return numbers
    return _trainer_faults(scenario) + _engine_faults(scenario)


def _trainer_faults(scenario: Scenario) -> list[str]:
    config, count, hf_config = scenario.config, scenario.machine.count, scenario.model.hf_config
    found = [
        *check_batch(config, count),
        *check_layout(config.parallel, world_size=count, device="cuda"),
        *check_cut(config.parallel, hf_config),
        *check_experts(config.parallel, hf_config),
        *check_lengths(config, hf_config),
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
    policy: with engines beside it, else those in FP8; and with engines on nodes of their own."""
    config, vllm = scenario.config, scenario.config.rollout.vllm
    if check_numbers(config):
        return []
    known: Known = {}
    found = _search(scenario, config, known)
    servers: list[Layout] = []
    if scenario.has_vllm_here:
        in_fp8 = not found and vllm.quantization == "none"
        if in_fp8:
            quantized = _with_vllm(config, replace(vllm, quantization="fp8"))
            found = _search(scenario, quantized, known)
        servers = sorted(_with_servers(scenario, known, most), key=_rank(scenario))
        if in_fp8:  # which samples from other weights: what does not is shown, whatever it costs
            most -= min(1, len(servers))
            return sorted(found, key=_rank(scenario))[:most] + servers[:1]
    return sorted(found + servers, key=_rank(scenario))[:most]


def _with_servers(scenario: Scenario, known: "Known", most: int) -> list[Layout]:
    """The trainer has all GPUs, to which come whole nodes of engines: the quickest trainers, each
    with the engines that suit it. Its memory does not depend on them."""
    starts = list(_servers(scenario))
    if not starts:
        return []
    found, rank = [], _rank(scenario)
    for layout in sorted(_search(scenario, starts[-1], known), key=rank)[:most]:
        configs = [replace(layout.config, rollout=start.rollout) for start in starts]
        tried = [_layout(scenario, config, known) for config in configs]
        found.append(min(filter(None, tried), key=rank))
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


def _search(scenario: Scenario, start: Config, known: "Known") -> list[Layout]:
    """`start` is where the search begins, the scenario's configuration what overrides change."""
    best: dict[Any, Layout] = {}
    rank = _rank(scenario)
    for config in _trainers(replace(scenario, config=start)):
        key = config.parallel
        for seconds, engines in _engines(replace(scenario, config=config), known):
            if key in best and seconds > best[key].duration.total:
                break  # the quickest come first
            if (layout := _layout(scenario, engines, known)) is not None:
                if key not in best or rank(layout) < rank(best[key]):
                    best[key] = layout
                break
    return list(best.values())


Known = dict[tuple[Any, ...], float]
"""Seconds in which engines of vLLM sample: they do not depend on the trainer beside them."""


def _sampling(scenario: Scenario, known: Known) -> float | None:
    """None for another engine than vLLM."""
    vllm = scenario.config.rollout.vllm
    if scenario.config.rollout.engine != "vllm":
        return None
    room = cache_room(scenario)
    engine = (vllm.tensor, vllm.placement, vllm.engines, vllm.quantization, room)
    if engine not in known:
        known[engine] = rollout_seconds(scenario, room)
    return known[engine]


def _layout(scenario: Scenario, config: Config, known: Known) -> Layout | None:
    """None where it does not fit."""
    tried = replace(scenario, config=config)
    held = memory(tried)
    if not held.fits:
        return None
    return Layout(
        overrides=_overrides(scenario.config, config),
        config=config,
        memory=held,
        duration=duration(tried, held, with_sync=False, rollout=_sampling(tried, known)),
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
    for parallel, budget in itertools.product(layouts, budgets):
        learning = replace(config.optimizer, max_tokens_per_microbatch=budget)
        candidate = replace(config, parallel=parallel, optimizer=learning)
        if _trainer_faults(replace(scenario, config=candidate)):
            continue
        for recompute in ("none", "full"):
            yield replace(candidate, model=replace(config.model, recompute=recompute))


def _engines(scenario: Scenario, known: Known) -> list[tuple[float, Config]]:
    """Every size of a colocated engine, with the largest share of memory that fits beside it, or
    beside what is left of the trainer when its memory is lent: those with the fewest seconds of a
    step first."""
    config, vllm = scenario.config, scenario.config.rollout.vllm
    if not scenario.has_vllm_here:
        return [] if _engine_faults(scenario) else [(0.0, config)]
    empty = replace(vllm, gpu_memory_utilization=0.0, kv_cache_gib=0.0, park_trainer=True)
    held = memory(replace(scenario, config=_with_vllm(config, empty)))
    if max(held.phases["score"], held.phases["update"]) > held.capacity:
        return []  # whatever the engine
    lending = duration(scenario, held, with_sync=False, rollout=0.0)
    room, found = held.capacity - held.standing - held.margin, []
    for tensor in ENGINE_TENSOR:
        shares_experts = bool(scenario.model.experts) and tensor > 1
        sized = replace(vllm, tensor=tensor, expert_parallel=shares_experts)
        if _engine_faults(replace(scenario, config=_with_vllm(config, sized))):
            continue
        for is_lent in sorted({vllm.park_trainer, True}):
            free = room + (held.parked if is_lent else 0)
            share = next((share for share in SHARES if share * held.capacity <= free), None)
            if share is None:
                continue
            lent = replace(sized, park_trainer=is_lent, gpu_memory_utilization=share)
            tried = _with_vllm(config, lent)
            seconds = lending.total - (0.0 if is_lent else lending.rollout)
            seconds += _sampling(replace(scenario, config=tried), known) or 0.0
            found.append((round(seconds, 1), is_lent, tensor, tried))
    return [(seconds, tried) for seconds, *_, tried in sorted(found, key=lambda one: one[:3])]


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
