"""Engines that die when they are told to, and what ranks do with them."""

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megasd.rollout.config import SyncConfig
from megasd.rollout.engine import EngineLostError, Request
from megasd.rollout.fleet import Fleet
from megasd.rollout.placement import Seat
from megasd.rollout.spread import Spread
from megasd.types import Prompt, Rollout
from megasd.weights.bucket import Bucket


class FakePolicy:
    """Three buckets that the ranks gather together: a walk that one rank leaves hangs."""

    version = 0

    def weight_buckets(self, *, takes: bool) -> Iterator[Bucket]:
        for number in range(3):
            flat = torch.tensor([float(dist.get_rank() == 0) * self.version])
            dist.all_reduce(flat)
            yield Bucket({f"w{number}": flat}, flat)

    def score_plainly(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.full(len(ids) - 1, -1.0) for ids in sequences]


class FakeEngine:
    """Answers with its version; `deaths` say at which calls of what it dies."""

    def __init__(
        self,
        name: int,
        deaths: Sequence[tuple[str, int]],
        bias: float = 0.0,
        slowness: float = 0.0,  # seconds, to start and to sample
    ) -> None:
        self.name, self.deaths, self.bias, self.slowness = name, list(deaths), bias, slowness
        self.share = 0  # of the last call
        self.calls: dict[str, int] = {"load": 0, "generate": 0}
        self.value: float | None = None
        self.checks: list[bool] = []
        self.answered: list[int] = []

    def _dies(self, call: str) -> bool:
        self.calls[call] += 1
        return (call, self.calls[call]) in self.deaths

    def load_weights(self, buckets: Iterable[Bucket], version: int, *, check: bool = True) -> None:
        self.value = None
        self.checks.append(check)
        time.sleep(self.slowness)
        walk = iter(buckets)
        next(walk)
        if self._dies("load"):
            raise EngineLostError(f"engine {self.name} died while loading")
        if ("refuse", self.calls["load"]) in self.deaths:
            raise RuntimeError("w9 is missing")
        for bucket in walk:
            self.value = float(bucket.flat)
        assert self.value == version

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        assert self.value is not None, "no weights"
        time.sleep(self.slowness)
        self.share = len(requests)
        dies = self._dies("generate")
        done = requests[: len(requests) // 2] if dies else requests
        rollouts = [self._rollout(request) for request in done]
        self.answered += [request.sample for request in done]
        if dies:
            self.value = None
            missing = range(len(done), len(requests))
            raise EngineLostError(f"engine {self.name} died", rollouts=rollouts, missing=missing)
        return rollouts

    def _rollout(self, request: Request) -> Rollout:
        assert self.value is not None
        return Rollout(
            prompt=request.prompt,
            group_id=0,
            sample=request.sample,
            token_ids=np.array([request.sample]),
            logprobs=None,
            text="",
            finish_reason="stop",
            policy_version=int(self.value),
        )

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.full(len(ids) - 1, -1.0 + self.bias) for ids in sequences]

    def metrics(self) -> dict[str, float]:
        share = {"share_max": self.share, "engine/tokens_per_second": 1e9 * self.share}
        return {"speed": 1.0, "queue_max": float(self.name)} | share

    def sleep(self) -> None:
        self.value = None

    def close(self) -> None: ...


def requests(count: int) -> list[Request]:
    prompt = Prompt(index=0, messages=(), token_ids=np.array([1, 2]))
    return [
        Request(
            prompt=prompt,
            group_id=0,
            sample=sample,
            seed=0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_response_tokens=1,
        )
        for sample in range(count)
    ]


def fleet_of(deaths: dict[int, list[tuple[str, int]]], bias: float = 0.0, **options: Any) -> Fleet:
    """Engine n on rank 2n of four; engine 1 scores `bias` too high."""
    rank = dist.get_rank()
    number, has_engine = rank // 2, rank % 2 == 0
    engine: Any = None
    if has_engine:
        engine = FakeEngine(number, deaths.get(number, []), bias if number == 1 else 0.0)
    seat = Seat(number) if has_engine else None
    return Fleet(engine, seat, 2, SyncConfig(checksum_every=2), **options)


def live_through(deaths: dict[int, list[tuple[str, int]]]) -> dict[str, Any]:
    """Three steps of a run; what every rank saw, and what its engine was asked."""
    fleet, policy = fleet_of(deaths), FakePolicy()
    seen = []
    for version in (0, 1, 2):
        policy.version = version
        fleet.send(policy)
        fleet.send(policy)  # nothing to do
        rollouts = fleet.generate(requests(9))
        seen.append([(r.sample, r.policy_version) for r in rollouts])
        fleet.sleep()
    engine: Any = fleet.engine
    return {
        "seen": seen,
        "metrics": fleet.metrics(),
        "checks": engine.checks if engine else None,
        "answered": sorted(engine.answered) if engine else None,
    }


def outlast_the_deadline() -> list[int]:
    """Engine 0 takes twice the time that collectives of the default group have; so do rewards."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.25), dist.group.WORLD)
    fleet = fleet_of({})
    engine: Any = fleet.engine
    if dist.get_rank() == 0:
        engine.slowness = 0.5
    fleet.send(FakePolicy())
    samples = [rollout.sample for rollout in fleet.generate(requests(4))]
    judge = Spread(0 if dist.get_rank() == 0 else None, 1)
    return judge.map(samples, lambda share: time.sleep(0.5) or list(share))


def hear_of_large_results() -> tuple[list[int], int]:
    """Two of the ranks have a megabyte each to say; the bytes that this rank makes room for."""
    made, gathered, told = 0, dist.all_gather, dist.broadcast

    def count(*tensors: torch.Tensor) -> None:
        nonlocal made
        made += sum(tensor.nbytes for tensor in tensors)

    def all_gather(tensors: list[torch.Tensor], *rest: Any, **options: Any) -> Any:
        count(*tensors)
        return gathered(tensors, *rest, **options)

    def broadcast(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
        count(tensor)
        return told(tensor, *rest, **options)

    module: Any = dist.distributed_c10d
    module.all_gather, module.broadcast = all_gather, broadcast
    try:
        spread = Spread({1: 1, 3: 0}.get(dist.get_rank()), 2)
        heard = spread.map([7, 8], lambda share: [bytes([item]) * 2**20 for item in share])
    finally:
        module.all_gather, module.broadcast = gathered, told
    return [one[0] for one in heard], made


def sample_through_a_death() -> dict[str, float]:
    """Shares of 4 and 5; the second dies after two, then the shares are 1 and 2."""
    fleet = fleet_of({1: [("generate", 1)]})
    fleet.send(FakePolicy())
    fleet.generate(requests(9))
    return fleet.metrics()


def compare_on_a_probe(bias: float) -> float:
    fleet = fleet_of({}, bias, probe=[np.array([1, 2, 3])], max_probe_gap=0.01)
    fleet.send(FakePolicy())
    return fleet.metrics()["engine/probe_gap"]
