"""Which rank has which engine: arithmetic only."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megasd.rollout.config import RolloutConfig


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's part in engine `number`; its owner, number 0 of `size` ranks, speaks with it."""

    number: int
    rank: int = 0
    size: int = 1

    @property
    def is_owner(self) -> bool:
        return self.rank == 0


def feeders(config: RolloutConfig, *, ranks_per_stage: int, world_size: int, is_cuda: bool) -> int:
    """How many consecutive ranks feed one engine: rank i its worker i, or one rank all workers.

    Beside the trainer each rank feeds the worker on its own GPU. On servers it takes as many where
    workers share out whole experts and the ranks of a stage can be cut so: each rank then gathers
    and sends what one worker keeps, over its own network card. Workers without shared experts all
    take in the whole model, which one rank sends to all of them at the same time.
    """
    vllm = config.vllm
    if config.engine != "vllm":
        return 1
    if vllm.placement == "colocated":
        return vllm.tensor if is_cuda else 1
    fits = vllm.engines * vllm.tensor <= world_size and ranks_per_stage % vllm.tensor == 0
    return vllm.tensor if vllm.expert_parallel and fits else 1


def seats(
    config: RolloutConfig,
    *,
    replica_starts: list[int],
    ranks_per_stage: int,
    world_size: int,
    is_cuda: bool,
) -> dict[int, Seat]:
    """Every rank that takes part in an engine, by rank.

    - hf, and vllm beside a trainer on CPUs: one engine per data-parallel replica, on its first
      rank (`replica_starts`);
    - vllm, colocated on GPUs: consecutive ranks share an engine that runs on their GPUs;
    - vllm on servers: `engines` of them, each fed by consecutive ranks (`feeders`) of one pipeline
      stage, spread over the ranks.
    """
    vllm, is_vllm = config.vllm, config.engine == "vllm"
    size = feeders(config, ranks_per_stage=ranks_per_stage, world_size=world_size, is_cuda=is_cuda)
    blocks = world_size // size
    if is_vllm and vllm.placement == "server":
        starts = [n * blocks // vllm.engines * size for n in range(vllm.engines)]
    elif is_vllm and is_cuda:
        starts = [block * size for block in range(blocks)]
    else:
        starts = replica_starts
    return {
        start + rank: Seat(number, rank, size)
        for number, start in enumerate(starts)
        for rank in range(size)
    }


@dataclass(frozen=True, slots=True)
class Gpu:
    """Of one rank."""

    host: str
    uuid: str
    number: str  # by which a process finds it, as in CUDA_VISIBLE_DEVICES


def check_gpus(seating: Mapping[int, Seat], gpus: Sequence[Gpu]) -> None:
    """Raises ValueError where an engine could not run on the GPUs (by rank) of its ranks."""
    for (a, one), (b, other) in itertools.combinations(enumerate(gpus), 2):
        if (one.host, one.uuid) == (other.host, other.uuid):
            raise ValueError(
                f"ranks {a} and {b} run on one GPU, {one.uuid} of node {one.host}: start as many "
                "ranks on a node as it has GPUs"
            )
        shared = a in seating and b in seating and seating[a].number == seating[b].number
        if shared and one.host != other.host:
            raise ValueError(
                f"rollout.vllm.tensor: ranks {a} and {b} share an engine and are on nodes "
                f"{one.host} and {other.host}; choose a size that divides the ranks of a node"
            )
        if shared and one.number == other.number:
            raise ValueError(
                f"ranks {a} and {b} of node {one.host} share an engine, and each sees its own GPU "
                f"only, as number {one.number}: an engine has to see the GPUs of all its ranks; "
                "start the ranks without GPU binding (--gpus-per-task, --gpu-bind)"
            )


def expert_receivers(
    config: RolloutConfig, *, ranks_per_stage: int, world_size: int, is_cuda: bool
) -> int:
    """Over how many consecutive ranks the engines cut their experts, if each feeds one worker."""
    size = feeders(config, ranks_per_stage=ranks_per_stage, world_size=world_size, is_cuda=is_cuda)
    return size if config.vllm.expert_parallel else 1
