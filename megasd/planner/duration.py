"""Seconds of a step by phase: work over what the GPUs are assumed to reach of their peaks.

A model of few parts, for comparing layouts; no figure of it was measured by megasd, docs/plan.md
holds it against the steps that others published. Nothing overlaps but the gradients' sum over the
replicas. All figures are of a mean step, whose prompts and responses have
`Assumptions.mean_length` of their maximal lengths.
"""

from dataclasses import dataclass

from megasd.planner.buffers import sizes_of
from megasd.planner.decoding import rollout_seconds
from megasd.planner.hardware import GB
from megasd.planner.memory import Memory, Scenario
from megasd.planner.passes import Pass
from megasd.planner.sync import Links, reload_seconds, sync_seconds
from megasd.rollout.placement import expert_receivers
from megasd.weights.reshard import ReshardPlan
from megasd.weights.traffic import traffic


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of one step; `communication`, `bubble` and `optimizer` are parts of `update`."""

    sync: float
    rollout: float
    score: float
    update: float
    communication: float
    bubble: float
    optimizer: float
    mfu: float  # of the update: the model's own products over the peak

    @property
    def phases(self) -> dict[str, float]:
        return {
            "sync": self.sync,
            "rollout": self.rollout,
            "score": self.score,
            "update": self.update,
        }

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def duration(
    scenario: Scenario, memory: Memory, *, with_sync: bool = True, rollout: float | None = None
) -> Duration:
    """`with_sync` False leaves the sync at 0: its plan takes milliseconds to walk. `rollout`: the
    seconds in which the engines sample, where they are known."""
    config, machine = scenario.config, scenario.machine
    samples = not config.algorithm.needs.solutions
    bubbles = (config.parallel.pipeline - 1) / scenario.microbatches
    forwards = 2 if config.model.recompute == "full" else 1
    learning = Pass.over(scenario, forwards=forwards, backwards=1)
    compute = learning.compute_seconds(scenario)
    communication = learning.communication_seconds(scenario)
    steps = config.optimizer.minibatches_per_step
    # The last micro-batch's backward pass, beside which gradients are scattered.
    beside = compute * 2 / (forwards + 2) / (steps * scenario.microbatches)
    optimizer = steps * _optimizer_seconds(scenario, memory, beside)
    bubble = (compute + communication) * bubbles
    update = compute + communication + bubble + optimizer
    score = sum(
        (1 + bubbles) * (one.compute_seconds(scenario) + one.communication_seconds(scenario))
        for one in _score_passes(scenario)
    )
    if rollout is None:
        rollout = rollout_seconds(scenario, memory.cache_room)
    ranks = machine.count / scenario.replicas
    return Duration(
        sync=_sync(scenario) if samples and with_sync else 0.0,
        rollout=rollout + _lending(scenario, memory) if samples else 0.0,
        score=score,
        update=update,
        communication=communication,
        bubble=bubble,
        optimizer=optimizer,
        mfu=learning.model_flops() / (ranks * update * machine.gpu.bf16_flops),
    )


def _score_passes(scenario: Scenario) -> list[Pass]:
    """The student before the update where it is needed, and one pass for each role."""
    config = scenario.config
    needs = config.algorithm.needs
    compares = needs.teachers and (needs.old_logprobs or needs.cross_entropy)
    several = config.optimizer.minibatches_per_step > 1
    mismatch = config.rollout.mismatch
    corrects = mismatch.level != "off" and mismatch.needs_old_logprobs
    reads = several or needs.entropy or compares or corrects or needs.support == "student"
    passes = [Pass.over(scenario)] if reads else []
    for role in needs.teachers:
        short = role == "reference" or config.context.sources in ([], ["answer"])
        context = 0 if short else scenario.assumed.mean_length * config.context.max_tokens
        model = None if role == "reference" else scenario.teacher_model
        passes.append(Pass.over(scenario, extra_tokens=context, model=model))
    return passes


def _lending(scenario: Scenario, memory: Memory) -> float:
    """What the trainer parks in host memory, there and back; gradients are freed."""
    kept = max(0, memory.parked - memory.gradients)
    return 2 * kept / (scenario.assumed.host_gb * GB)


def _optimizer_seconds(scenario: Scenario, memory: Memory, beside: float) -> float:
    """Gradients scattered, as far as they are not in `beside` seconds; state read and written,
    parameters gathered."""
    machine, parallel = scenario.machine, scenario.config.parallel
    apart = machine.count // parallel.pipeline
    ways = apart // parallel.tensor
    share = (ways - 1) / ways / (machine.bandwidth(apart) * scenario.assumed.collectives)
    scattered = max(0.0, memory.gradients * share - beside)
    touched = 2 * memory.optimizer + memory.gradients
    bandwidth = machine.gpu.memory_bandwidth * scenario.assumed.copies
    return scattered + memory.weights * share + touched / bandwidth


def _sync(scenario: Scenario) -> float:
    """Of the rank that takes in most, by the plan that a sync executes."""
    config, machine, assumed = scenario.config, scenario.machine, scenario.assumed
    sizes = sizes_of(config.parallel)
    plan = ReshardPlan(
        scenario.model.table,
        sizes,
        bucket_bytes=config.rollout.sync.bucket_mib * 2**20,
        receivers=expert_receivers(
            config.rollout,
            ranks_per_stage=machine.count // sizes.pp,
            world_size=machine.count,
            is_cuda=True,
        ),
    )
    links = Links(
        nvlink=machine.gpu.nvlink_bandwidth * assumed.collectives,
        network=machine.gpu.network_bandwidth * assumed.collectives,
        memory=machine.gpu.memory_bandwidth * assumed.copies,
        round_seconds=assumed.round_seconds,
    )
    taken_in = max(
        sync_seconds(
            traffic(plan, pp=stage, stage_rank=0, element_bytes=scenario.dtype_bytes),
            sizes,
            machine.count,
            links,
        )
        for stage in {0, sizes.pp - 1}
    )
    vllm = config.rollout.vllm
    if config.rollout.engine == "vllm" and vllm.placement == "server":
        # Each rank that feeds it sends what it took in, over its network card.
        width = 1 if vllm.quantization == "fp8" else scenario.dtype_bytes
        taken_in += traffic(plan, pp=0, stage_rank=0, element_bytes=width).total / links.network
    return taken_in + reload_seconds(scenario.model, config.rollout, assumed)
