"""What the fullest rank of a run holds on its GPU, by kind and by phase of a step.

Weights, gradients, optimizer state and the teacher's weights are exact (buffers.py). What a
forward pass saves follows the lists of activations.py. The rest are estimates, each with the
figure that it stands on in `Assumptions`.
"""

import math
from dataclasses import asdict, dataclass, replace

from megasd.configuration.load import Config
from megasd.configuration.validate import longest_rollout, longest_view
from megasd.planner.activations import (
    Cut,
    forward_pass,
    gather_buffer,
    kept_on_stage,
    last_norm_going_backward,
    last_norm_saved,
    layers_going_backward,
)
from megasd.planner.buffers import Held, held_bytes
from megasd.planner.hardware import GIB, Assumptions, Machine
from megasd.planner.model import Model
from megasd.policy.config import ParallelConfig

HEAD_ROWS = 8192  # vocabulary rows of one block of policy/head/blocks.py
# Of a response token, on every rank: ids, masks, log-probs, entropies, advantages, the copies of a
# pass that are summed over the ranks.
TOKEN_BYTES = 96


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank. Those of the engine, `working` and `scoring` are not held all the time."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    batch: int  # what was read of the step's rollouts
    float8: int  # update: copies of the layers' weights, along rows and along columns
    activations: int  # update: what the layers keep of the micro-batches in flight
    head: int  # update: what the last norm and the head save, and their backward passes need
    working: int  # update, once the head's is freed: what a layer's backward pass needs
    scoring: int  # score: a forward pass, a moving average in the model's dtype, float8 copies
    engine_weights: int
    engine_cache: int
    sync_buckets: int
    engine_asleep: int
    context: int
    nccl: int
    margin: int  # fragmentation, where the trainer allocates most
    parked: int  # of the trainer's, in host memory or freed while engines sample
    engine_claim: int  # what vLLM wants free when it starts
    cache_room: int  # for keys and values on each GPU of an engine, here or on nodes of its own
    cache_needed: int  # of it, by one longest sequence
    capacity: int

    @property
    def standing(self) -> int:
        """Held through the whole step."""
        mine = self.weights + self.gradients + self.optimizer + self.teacher
        return mine + self.context + self.nccl

    @property
    def learning(self) -> int:
        """The head has gone backward, and freed what it saved, before the first layer does."""
        return self.float8 + self.activations + max(self.head, self.working)

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase, margin included."""
        trainer = self.standing + self.margin
        asleep = trainer + self.engine_asleep
        engine = self.engine_asleep + self.engine_weights
        left = trainer - self.parked
        return {
            "sync": left + engine + self.sync_buckets,
            "rollout": left + max(engine + self.engine_cache, self.engine_claim),
            "score": asleep + self.batch + self.scoring,
            "update": asleep + self.batch + self.learning,
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and self.cache_room >= self.cache_needed

    @property
    def kinds(self) -> dict[str, int]:
        others = ("stage", "capacity", "parked", "engine_claim", "cache_room", "cache_needed")
        return {name: value for name, value in asdict(self).items() if name not in others}

    @property
    def largest(self) -> str:
        """The kind that takes most."""
        return max(self.kinds, key=self.kinds.__getitem__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """A configuration on a machine: what every formula of the planner reads."""

    config: Config
    model: Model
    machine: Machine
    assumed: Assumptions
    teacher_model: Model | None = None  # teacher.weights: checkpoint

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.config.model.dtype == "float32" else 2

    @property
    def replicas(self) -> int:
        """Data-parallel copies of the dense part."""
        parallel = self.config.parallel
        return self.machine.count // (parallel.tensor * parallel.pipeline)

    @property
    def rollouts(self) -> int:
        return self.config.rollout.prompts_per_step * self.config.rollout.group_size

    @property
    def mean_response(self) -> float:
        return self.assumed.mean_length * self.config.rollout.max_response_tokens

    @property
    def mean_prompt(self) -> float:
        return self.assumed.mean_length * self.config.data.max_prompt_tokens

    @property
    def microbatches(self) -> int:
        """Of one optimizer step on one replica."""
        rollouts = self.rollouts / self.config.optimizer.minibatches_per_step
        tokens = rollouts * (self.mean_prompt + self.mean_response) / self.replicas
        return max(1, -(-int(tokens) // self.config.optimizer.max_tokens_per_microbatch))

    @property
    def packed_tokens(self) -> int:
        """The most that a micro-batch has: what is allowed, or all that a replica reads."""
        longest = longest_view(self.config, self.model.hf_config)
        mine = -(-self.rollouts // max(1, self.replicas)) * longest
        return min(self.config.optimizer.max_tokens_per_microbatch, mine)

    @property
    def gpus(self) -> int:
        """The trainer's, and those of engines on nodes of their own."""
        vllm = self.config.rollout.vllm
        alone = self.config.rollout.engine == "vllm" and vllm.placement == "server"
        return self.machine.count + (vllm.engines * vllm.tensor if alone else 0)

    @property
    def has_vllm_here(self) -> bool:
        """vLLM shares the GPUs of the trainer."""
        rollout = self.config.rollout
        return rollout.engine == "vllm" and rollout.vllm.placement == "colocated"


def memory(scenario: Scenario) -> Memory:
    """Of the stage whose ranks hold most: the first, or the last, which has the head."""
    stages = {0, scenario.config.parallel.pipeline - 1}
    return max((stage_memory(scenario, stage) for stage in stages), key=lambda m: m.peak)


def stage_memory(scenario: Scenario, stage: int) -> Memory:
    """Of the first data-parallel rank of pipeline stage `stage`."""
    config, assumed = scenario.config, scenario.assumed
    held = _held(scenario, scenario.model, stage)
    cut = Cut(
        model=scenario.model,
        parallel=config.parallel,
        tokens=scenario.packed_tokens,
        longest=longest_view(config, scenario.model.hf_config),
        dtype_bytes=scenario.dtype_bytes,
        engine="local" if config.model.layers == "local" else "transformer_engine",
        imbalance=assumed.expert_imbalance if scenario.model.experts else 1.0,
    )
    stages, recompute = config.parallel.pipeline, config.model.recompute == "full"
    is_last = stage == stages - 1
    head, head_backward = _head(cut, config) if is_last else (0.0, 0.0)
    fp8, copied = config.model.fp8, _layer_weights(scenario)
    parts: dict[str, float] = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "teacher": _teacher(scenario, held, stage),
        "batch": _batch(scenario, is_last),
        "float8": 2 * copied if fp8 is not None and fp8.train else 0,
        "activations": gather_buffer(cut)
        + kept_on_stage(
            cut, stage=stage, recompute=recompute, in_flight=_in_flight(scenario, stage)
        ),
        "head": head_backward,
        "working": layers_going_backward(cut, recompute=recompute),
        "scoring": forward_pass(cut)
        + head
        + _in_place(scenario, held)
        + (copied if fp8 is not None and fp8.score else 0),
        **_engine(scenario, stage),
        "context": assumed.context_gib * GIB,
        "nccl": assumed.nccl_gib * GIB if scenario.machine.count > 1 else 0,
    }
    rounded = {name: int(value) for name, value in parts.items()}
    capacity = scenario.machine.gpu.memory_bytes
    parked = rounded["gradients"] + rounded["optimizer"] + rounded["teacher"]
    if not (scenario.has_vllm_here and config.rollout.vllm.park_trainer):
        parked = 0
    bare = Memory(stage=stage, margin=0, parked=parked, capacity=capacity, **rounded)
    trainer = bare.weights + bare.gradients + bare.optimizer + bare.teacher + bare.batch
    moving = max(bare.learning, bare.scoring)
    return replace(bare, margin=int(assumed.fragmentation * (trainer + moving)))


def _held(scenario: Scenario, model: Model, stage: int) -> Held:
    return held_bytes(
        model,
        scenario.config.parallel,
        world_size=scenario.machine.count,
        stage=stage,
        dtype_bytes=scenario.dtype_bytes,
    )


def _layer_weights(scenario: Scenario) -> float:
    """Matrix elements of a stage's layers on one rank, routers aside: what float8 is made of."""
    model, parallel = scenario.model, scenario.config.parallel
    layer = model.attention_weights / parallel.tensor
    if model.experts:
        experts = model.experts / parallel.expert * model.ffn_weights
        layer += experts / parallel.ranks_per_expert
    else:
        layer += model.ffn_weights / parallel.tensor
    return layer * model.layers / parallel.pipeline


def _in_flight(scenario: Scenario, stage: int) -> int:
    """Micro-batches whose backward pass is still to come, at most (one forward, one backward)."""
    return min(scenario.config.parallel.pipeline - stage, scenario.microbatches)


def _teacher(scenario: Scenario, held: Held, stage: int) -> int:
    """policy/teacher.py: copies of the parameters; ema in float32, cut over the data-parallel ranks
    like one of the optimizer's states; a teacher of its own."""
    config, e = scenario.config, scenario.dtype_bytes
    is_kept = "reference" in config.algorithm.needs.teachers and config.teacher.weights != "frozen"
    kept = held.parameters * e if is_kept else 0
    match config.teacher.weights:
        case "live":
            return kept
        case "ema":
            return kept + held.optimizer // (3 if e < 4 else 2)
        case "checkpoint":
            other = scenario.teacher_model or scenario.model
            return kept + _held(scenario, other, stage).parameters * e
        case _:
            return kept + held.parameters * e


def _in_place(scenario: Scenario, held: Held) -> int:
    """A moving average in the model's dtype, for the pass: kept weights are read where they are."""
    return held.weights if scenario.config.teacher.weights == "ema" else 0


def _batch(scenario: Scenario, is_last: bool) -> float:
    """Every response as long as it may be. Ids and hidden states stay where a token is read."""
    config, model = scenario.config, scenario.model
    tokens = scenario.rollouts * config.rollout.max_response_tokens
    needs = config.algorithm.needs
    held = tokens * TOKEN_BYTES
    if is_last:
        hidden = model.hidden * scenario.dtype_bytes if needs.teacher_hidden else 0
        # Of a replica's tokens, cut over its tensor-parallel ranks.
        own = tokens / scenario.replicas / config.parallel.tensor
        held += own * (needs.support_size * 8 + hidden)
        if needs.teacher_hidden and config.teacher.weights in ("live", "ema"):
            held += _head_shard(model, config.parallel) * scenario.dtype_bytes
    return held


def _head_shard(model: Model, parallel: ParallelConfig) -> int:
    return math.ceil(model.vocabulary / parallel.tensor) * model.hidden


def _head(cut: Cut, config: Config) -> tuple[float, float]:
    """What policy/head/head.py saves, every token read; and the most that lives of it and of the
    last norm before the layers go backward."""
    tokens, hidden, e = cut.tokens, cut.model.hidden, cut.dtype_bytes
    ids = config.algorithm.needs.support_size
    saved = tokens * (hidden * e + 8 + 8 + 12 + ids * (8 + 8 * 4))
    chunk = min(config.model.head_chunk_tokens_on("cuda"), tokens)
    teachers = 4 if config.algorithm.needs.teacher_hidden else 0
    blocks = chunk * HEAD_ROWS * (4 + teachers + e)  # logits of both sides, their gradient
    working = tokens * hidden * (4 + e) + _head_shard(cut.model, config.parallel) * e
    working += blocks
    return saved, max(last_norm_saved(cut) + saved + working, last_norm_going_backward(cut))


def _engine(scenario: Scenario, stage: int) -> dict[str, float]:
    """What the engine on this rank's GPU takes; servers have GPUs of their own."""
    config, model = scenario.config, scenario.model
    rollout, vllm = config.rollout, config.rollout.vllm
    names = ("engine_weights", "engine_cache", "sync_buckets", "engine_asleep", "engine_claim")
    taken: dict[str, float] = dict.fromkeys((*names, "cache_room", "cache_needed"), 0.0)
    taken["sync_buckets"] = 2 * rollout.sync.bucket_mib * 2**20
    sequence = longest_rollout(config)
    if rollout.engine == "hf":
        room = rollout.batch_size * sequence * cache_bytes(scenario, 1)
        if stage == 0:
            held = sum(math.prod(shape) for shape in model.table.hf_shapes().values())
            taken["engine_weights"] = held * scenario.dtype_bytes
            taken["engine_cache"] = room
        return taken | {"cache_room": room}
    capacity = scenario.machine.gpu.memory_bytes
    weights = engine_weight_bytes(scenario)
    asleep = scenario.assumed.asleep_engine_gib * GIB
    claim, room = vllm.gpu_memory_utilization * capacity, cache_room(scenario)
    taken["cache_room"] = room
    taken["cache_needed"] = sequence * cache_bytes(scenario, vllm.tensor)
    if not scenario.has_vllm_here:
        return taken
    return taken | {
        "engine_weights": weights,
        "engine_cache": room,
        "engine_asleep": asleep,
        "engine_claim": claim,
    }


def cache_room(scenario: Scenario) -> int:
    """Of a vLLM engine, for keys and values on each of its GPUs."""
    vllm, assumed = scenario.config.rollout.vllm, scenario.assumed
    if vllm.kv_cache_gib is not None:
        return int(vllm.kv_cache_gib * GIB)
    claim = vllm.gpu_memory_utilization * scenario.machine.gpu.memory_bytes
    return int(max(0, claim - engine_weight_bytes(scenario) - assumed.asleep_engine_gib * GIB))


def cache_bytes(scenario: Scenario, tensor: int) -> int:
    """Keys and values of one token on each of an engine's GPUs."""
    model = scenario.model
    kv_heads = math.ceil(model.kv_heads / tensor)
    return model.layers * 2 * kv_heads * model.head_dim * scenario.dtype_bytes


def engine_weight_bytes(scenario: Scenario) -> float:
    """Of each GPU of a vLLM engine; with more GPUs than key-value heads some hold the same."""
    model, vllm = scenario.model, scenario.config.rollout.vllm
    kv_ways = min(vllm.tensor, model.kv_heads)
    queries = 2 * model.hidden * model.heads * model.head_dim / vllm.tensor
    keys = 2 * model.hidden * model.kv_heads * model.head_dim / kv_ways
    router = model.hidden * model.experts
    experts = max(1, model.experts) * model.ffn_weights / vllm.tensor
    ends = model.head_weights * (1 if model.hf_config["tie_word_embeddings"] else 2) / vllm.tensor
    matrix = 1.0 if vllm.quantization == "fp8" else scenario.dtype_bytes
    layers = model.layers * ((queries + keys + experts) * matrix + router * scenario.dtype_bytes)
    return layers + ends * scenario.dtype_bytes
