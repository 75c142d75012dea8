"""Seconds of a step by phase: work over what the GPUs are assumed to reach of their peaks.

A model of a few lines, for comparing layouts; no figure of it was measured. Nothing overlaps:
megasd's trainer waits for its collectives. All figures are of a mean step, whose prompts and
responses have `Assumptions.mean_length` of their maximal lengths.
"""

from dataclasses import dataclass
from math import ceil

from megasd.planner.buffers import sizes_of
from megasd.planner.memory import Memory, Scenario, cache_bytes, engine_weight_bytes
from megasd.planner.model import Model
from megasd.planner.sync import Links, far_share, sync_seconds
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


def duration(scenario: Scenario, memory: Memory, *, with_sync: bool = True) -> Duration:
    """`with_sync` False leaves the sync at 0: its plan takes milliseconds to walk."""
    config = scenario.config
    samples = not config.algorithm.needs.solutions
    forward = _Pass.over(scenario, extra_tokens=0.0)
    m, stages = scenario.microbatches, config.parallel.pipeline
    is_full = config.model.recompute == "full"
    passes, moves = (4, 14) if is_full else (3, 10)  # forward, backward (2), forward again
    steps = config.optimizer.minibatches_per_step
    compute = forward.stage_seconds(scenario, scenario.assumed.train_flops, passes, 4)
    communication = forward.communication_seconds(scenario, moves)
    optimizer = steps * _optimizer_seconds(scenario, memory)
    bubble = (compute + communication) * (stages - 1) / m
    score = sum(
        (1 + (stages - 1) / m)
        * (
            one.stage_seconds(scenario, scenario.assumed.score_flops, 1, 1)
            + one.communication_seconds(scenario, 4)
        )
        for one in _score_passes(scenario)
    )
    return Duration(
        sync=_sync(scenario) if samples and with_sync else 0.0,
        rollout=_rollout(scenario, memory) if samples else 0.0,
        score=score,
        update=compute + communication + bubble + optimizer,
        communication=communication,
        bubble=bubble,
        optimizer=optimizer,
    )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One forward pass over a step's rollouts, as seen by one replica."""

    model: Model  # that reads them
    tokens: float  # packed, of one replica
    responses: float  # of them those that the head reads
    length: float  # of a sequence

    @classmethod
    def over(cls, scenario: Scenario, extra_tokens: float, model: Model | None = None) -> "_Pass":
        rollouts = scenario.rollouts / scenario.replicas
        length = scenario.mean_prompt + scenario.mean_response + extra_tokens
        return cls(
            model=model or scenario.model,
            tokens=rollouts * length,
            responses=rollouts * scenario.mean_response,
            length=length,
        )

    def stage_seconds(
        self, scenario: Scenario, reached: float, passes: int, head_passes: int
    ) -> float:
        """Matrix products of the slowest stage: the last one, whose head reads the responses.

        `passes` over the layers, counted in forward passes; the head's backward pass always
        computes the logits once more.
        """
        model, parallel, assumed = self.model, scenario.config.parallel, scenario.assumed
        dense = model.attention_weights + (0 if model.experts else model.ffn_weights)
        attention = 2 * model.heads * model.head_dim * self.length / 2  # weights' equivalent
        small = 0.0
        if model.experts:
            small = model.experts_per_token * model.ffn_weights / assumed.expert_flops
            small *= assumed.expert_imbalance
        layers = model.layers / parallel.pipeline
        flops = 2 * passes * self.tokens * layers * (dense + attention + small)
        flops += 2 * head_passes * self.responses * model.head_weights
        return flops / (parallel.tensor * scenario.machine.gpu.bf16_flops * reached)

    def communication_seconds(self, scenario: Scenario, moves: int) -> float:
        """Of one stage's ranks. A layer's forward pass gathers twice and scatters twice over the
        tensor-parallel ranks (4 moves), its backward pass 6; experts exchange half as often."""
        model, parallel, machine = self.model, scenario.config.parallel, scenario.machine
        reached, e = scenario.assumed.collectives, scenario.dtype_bytes
        layers, tp = model.layers / parallel.pipeline, parallel.tensor
        bytes_of_rows = self.tokens * model.hidden * e
        seconds = 0.0
        if tp > 1:
            moved = moves * layers * bytes_of_rows * (tp - 1) / tp
            seconds += moved / (machine.bandwidth(tp) * reached)
        ranks = parallel.expert * parallel.ranks_per_expert
        if model.experts and ranks > 1:
            slots = self.tokens / tp * parallel.ranks_per_expert * model.experts_per_token
            moved = moves / 2 * layers * slots * model.hidden * e * (ranks - 1) / ranks
            moved *= scenario.assumed.expert_imbalance
            far = far_share(ranks)
            seconds += moved * (1 - far) / (machine.gpu.nvlink_bandwidth * reached)
            seconds += moved * far / (machine.gpu.network_bandwidth * reached)
        if parallel.pipeline > 1:
            rows = bytes_of_rows / (tp if parallel.sequence else 1)
            apart = machine.count // parallel.pipeline + 1
            seconds += moves / 4 * rows / (machine.bandwidth(apart) * reached)
        return seconds


def _score_passes(scenario: Scenario) -> list[_Pass]:
    """The student before the update where it is needed, and one pass for each role."""
    config = scenario.config
    needs = config.algorithm.needs
    compares = needs.teachers and (needs.old_logprobs or needs.cross_entropy)
    several = config.optimizer.minibatches_per_step > 1
    mismatch = config.rollout.mismatch
    corrects = mismatch.level != "off" and mismatch.needs_old_logprobs
    reads = several or needs.entropy or compares or corrects or needs.support == "student"
    passes = [_Pass.over(scenario, 0.0)] if reads else []
    for role in needs.teachers:
        short = role == "reference" or config.context.sources in ([], ["answer"])
        context = 0 if short else scenario.assumed.mean_length * config.context.max_tokens
        model = None if role == "reference" else scenario.teacher_model
        passes.append(_Pass.over(scenario, context, model))
    return passes


def _optimizer_seconds(scenario: Scenario, memory: Memory) -> float:
    """Gradients scattered, state read and written, parameters gathered."""
    machine, parallel = scenario.machine, scenario.config.parallel
    apart = machine.count // parallel.pipeline
    ways = apart // parallel.tensor
    moved = (memory.gradients + memory.weights) * (ways - 1) / max(1, ways)
    seconds = moved / (machine.bandwidth(apart) * scenario.assumed.collectives)
    touched = 2 * memory.optimizer + memory.gradients
    return seconds + touched / (machine.gpu.memory_bandwidth * scenario.assumed.decode_bandwidth)


def _rollout(scenario: Scenario, memory: Memory) -> float:
    """Prompts once, then one token of every running sequence at a time.

    As long as the mean of all sequences takes, or the longest of them: what is longer.
    """
    config, machine = scenario.config, scenario.machine
    rollout, vllm, assumed = config.rollout, config.rollout.vllm, scenario.assumed
    if rollout.engine == "hf":
        engines, tensor, limit = scenario.replicas, 1, rollout.batch_size
    else:
        tensor, limit = vllm.tensor, vllm.max_sequences
        engines = machine.count // tensor if scenario.has_vllm_here else vllm.engines
    sequences = scenario.rollouts / max(1, engines)
    context = scenario.mean_prompt + scenario.mean_response / 2
    per_sequence = (scenario.mean_prompt + scenario.mean_response) * cache_bytes(scenario, tensor)
    running = max(1.0, min(limit, sequences, memory.cache_room / per_sequence))
    decoder = _Decoder(scenario, tensor, context, rollout.engine == "hf")
    longest = rollout.max_response_tokens
    if rollout.engine == "hf":  # a batch lasts as long as its longest sequence
        decode = ceil(sequences / running) * longest * decoder.step_seconds(running)
    else:
        mean = sequences / running * scenario.mean_response * decoder.step_seconds(running)
        few = max(1.0, assumed.mean_length * running)
        decode = max(mean, longest * decoder.step_seconds(few))
    prompts = config.rollout.prompts_per_step * scenario.mean_prompt / max(1, engines)
    active = scenario.model.layers * scenario.model.active_weights
    prefill = 2 * prompts * active / (tensor * machine.gpu.bf16_flops * assumed.prefill_flops)
    return decode + prefill


@dataclass(frozen=True)
class _Decoder:
    scenario: Scenario
    tensor: int
    context: float
    is_hf: bool

    def step_seconds(self, running: float) -> float:
        """One token of each running sequence: weights and caches are read once."""
        model, gpu, assumed = self.scenario.model, self.scenario.machine.gpu, self.scenario.assumed
        weights = engine_weight_bytes(self.scenario)
        if model.experts:
            experts = model.layers * model.experts * model.ffn_weights / self.tensor
            experts *= 1 if self.scenario.config.rollout.vllm.quantization == "fp8" else 2
            touched = 1 - (1 - model.experts_per_token / model.experts) ** running
            weights -= experts * (1 - touched)
        read = weights + running * self.context * cache_bytes(self.scenario, self.tensor)
        flops = 2 * running * (model.layers * model.active_weights + model.head_weights)
        launch = assumed.hf_layer_seconds if self.is_hf else assumed.decode_layer_seconds
        return model.layers * launch + max(
            read / (gpu.memory_bandwidth * assumed.decode_bandwidth),
            flops / (self.tensor * gpu.bf16_flops * assumed.prefill_flops),
        )


def _sync(scenario: Scenario) -> float:
    """Of the rank that takes in most, by the plan that a sync executes."""
    config, machine, assumed = scenario.config, scenario.machine, scenario.assumed
    sizes = sizes_of(config.parallel)
    plan = ReshardPlan(
        scenario.model.table,
        sizes,
        bucket_bytes=config.rollout.sync.bucket_mib * 2**20,
        receivers=expert_receivers(config.rollout, is_cuda=True),
    )
    links = Links(
        nvlink=machine.gpu.nvlink_bandwidth * assumed.collectives,
        network=machine.gpu.network_bandwidth * assumed.collectives,
        memory=machine.gpu.memory_bandwidth * assumed.decode_bandwidth,
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
        # One rank feeds each engine, with all of it, over its network card.
        taken_in += engine_weight_bytes(scenario) * vllm.tensor / links.network
    return taken_in
