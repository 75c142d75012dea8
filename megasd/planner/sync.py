"""Seconds of a weight sync, from the bytes that its plan moves over each link."""

from dataclasses import dataclass

from megasd.planner.hardware import GPUS_PER_NODE, Assumptions
from megasd.planner.model import Model
from megasd.rollout.config import RolloutConfig
from megasd.weights.layout import Sizes
from megasd.weights.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bytes per second of one GPU and direction, as collectives reach them."""

    nvlink: float
    network: float
    memory: float
    round_seconds: float  # launching a gather, a merge, a broadcast and a hand-over


def far_share(ranks: int) -> float:
    """What part of an exchange over so many consecutive ranks leaves the node."""
    return max(0.0, 1 - GPUS_PER_NODE / ranks)


def sync_seconds(found: Traffic, sizes: Sizes, gpus: int, links: Links) -> float:
    """One link after the other, nothing overlapped: gather, merge, broadcast, take over."""
    far = far_share(sizes.ep * sizes.etp)
    near_seconds = (found.tensor_parallel + found.expert_parallel * (1 - far)) / links.nvlink
    far_seconds = found.expert_parallel * far / links.network
    stages_far = gpus // sizes.pp >= GPUS_PER_NODE
    pipeline_seconds = found.pipeline / (links.network if stages_far else links.nvlink)
    copies = 2 * (found.total - found.pipeline) + 2 * found.total  # merge; the engine's own copy
    return (
        near_seconds
        + far_seconds
        + pipeline_seconds
        + copies / links.memory
        + found.rounds * links.round_seconds
    )


def reload_seconds(model: Model, rollout: RolloutConfig, assumed: Assumptions) -> float:
    """What an engine does for each tensor that one of its workers loads, whatever its size; and
    of a colocated one, falling asleep and waking up.

    Experts are put into stacks, and a stack of each projection of a layer is loaded like a tensor.
    """
    if rollout.engine != "vllm":
        return 0.0
    stacks = model.layers * 3 if model.experts else 0
    loaded = len(model.table.hf_shapes()) - stacks * model.experts + stacks
    experts = stacks * model.experts / (rollout.vllm.tensor if rollout.vllm.expert_parallel else 1)
    seconds = loaded * assumed.tensor_seconds + experts * assumed.expert_seconds
    if rollout.vllm.quantization == "fp8":
        seconds *= 2  # and its scales
    cycle = assumed.engine_cycle_seconds if rollout.vllm.placement == "colocated" else 0.0
    return seconds + cycle
