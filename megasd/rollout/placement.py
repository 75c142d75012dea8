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


def seats(
    config: RolloutConfig, *, replica_starts: list[int], world_size: int, is_cuda: bool
) -> dict[int, Seat]:
    """Every rank that takes part in an engine, by rank.

    - hf, and vllm beside a trainer on CPUs: one engine per data-parallel replica, on its first
      rank (`replica_starts`);
    - vllm, colocated on GPUs: consecutive ranks share an engine that runs on their GPUs;
    - vllm on servers: `engines` of them, each spoken to by one rank, spread over the ranks.
    """
    vllm = config.vllm
    if config.engine == "vllm" and vllm.placement == "server":
        return {n * world_size // vllm.engines: Seat(n) for n in range(vllm.engines)}
    if config.engine == "vllm" and is_cuda:
        size = vllm.tensor
        return {rank: Seat(rank // size, rank % size, size) for rank in range(world_size)}
    return {rank: Seat(number) for number, rank in enumerate(replica_starts)}


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


def expert_receivers(config: RolloutConfig, *, is_cuda: bool) -> int:
    """Over how many consecutive ranks the engines cut their experts, if each feeds its own GPU."""
    vllm = config.vllm
    shares = config.engine == "vllm" and vllm.placement == "colocated" and vllm.expert_parallel
    return vllm.tensor if shares and is_cuda else 1
