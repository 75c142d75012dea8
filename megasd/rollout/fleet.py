"""All engines of a job, as the loop sees them: weights in, rollouts out, whatever dies on the way.

Every method is called by all ranks. An engine that is lost is started anew with the same weights,
and only the requests that it still owed are sampled again.
"""

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from megasd.process import interrupt, together
from megasd.rollout.config import SyncConfig
from megasd.rollout.engine import EngineLostError, Request, RolloutEngine
from megasd.rollout.placement import Seat
from megasd.rollout.probe import gap
from megasd.rollout.spread import Spread
from megasd.types import Rollout
from megasd.weights.bucket import Bucket

ATTEMPTS = 3
_RATE = "engine/tokens_per_second"


class Weights(Protocol):
    """What is sent: the policy."""

    version: int

    def weight_buckets(self, *, takes: bool) -> Iterator[Bucket]:
        """All ranks walk it together; those that take none may get none."""
        ...

    def score_plainly(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What `RolloutEngine.score` returns, on every rank."""
        ...


class Fleet:
    """This rank's engine, if it has one, and what it takes to act together with the others."""

    def __init__(
        self,
        engine: RolloutEngine | None,
        seat: Seat | None,  # None: this rank has no engine
        num_engines: int,
        config: SyncConfig,
        *,
        probe: Sequence[np.ndarray] = (),  # sequences to compare on; the same on every rank
        max_probe_gap: float = 0.001,
        feeds_training: bool = True,  # False: the engines sample for evaluation only
    ) -> None:
        self.engine = engine
        self.config = config
        self.feeds_training = feeds_training
        self._seat = seat
        owned = seat.number if seat is not None and seat.is_owner else None
        self._spread = Spread(owned, num_engines)
        self._probe, self._max_probe_gap = list(probe), max_probe_gap
        self._weights: Weights | None = None
        self._sent: int | None = None  # the version that every engine has
        self._syncs = self._restarts = 0
        self._probe_gap: float | None = None
        self._lost = ""  # why this rank's engine is gone; empty: it is there
        self._own: dict[str, float] = {}  # what this rank's engine said since `generate` was called
        self._tokens, self._seconds = 0, 0.0  # that it sampled, and took for them
        self._metrics: dict[str, float] = {}

    def send(self, weights: Weights) -> None:
        """Load the weights into every engine, unless they have this version already.

        The first time, the engines' log-probs of the probe are compared with the trainer's:
        RuntimeError, on every rank, when they are further apart than `max_probe_gap`.
        """
        if self._sent == weights.version:
            return
        self._weights = weights
        every = self.config.checksum_every
        self._load(
            everywhere=True, check=self._syncs == 0 or (every > 0 and self._syncs % every == 0)
        )
        self._sent = weights.version
        self._syncs += 1
        if self._probe_gap is None and self._probe:
            self._compare(weights)

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in their order, the same on every rank."""
        rollouts: list[Rollout | None] = [None] * len(requests)
        missing, reasons = list(range(len(requests))), []
        self._own, self._tokens, self._seconds = {}, 0, 0.0
        for _ in range(ATTEMPTS):
            answers = self._spread.map([requests[i] for i in missing], self._generate_share)
            for place, rollout in zip(missing, answers, strict=True):
                rollouts[place] = rollout
            missing = [i for i in missing if rollouts[i] is None]
            reasons = self._gather_metrics()
            if not missing:
                return [rollout for rollout in rollouts if rollout is not None]
            self._load(everywhere=False, check=True)
        raise RuntimeError(
            f"{len(missing)} of {len(requests)} responses could not be sampled in {ATTEMPTS} "
            f"attempts: {'; '.join(reasons)}"
        )

    def metrics(self) -> dict[str, float]:
        """What the engines said of the last `generate`, and of all syncs so far."""
        metrics = self._metrics | {"engine/restarts": float(self._restarts)}
        if self._probe_gap is not None:
            metrics["engine/probe_gap"] = self._probe_gap
        return metrics

    def sleep(self) -> None:
        """Give the accelerators' memory to the trainer, until the next `send`."""
        if self.engine is not None:
            self.engine.sleep()
        self._sent = None

    def close(self) -> None:
        """Called at the end, or when the run fails: by any rank, alone."""
        if self.engine is not None:
            self.engine.close()

    def _generate_share(self, share: Sequence[Request]) -> list[Rollout | None]:
        assert self.engine is not None
        if self._lost or not share:
            return [None] * len(share)
        start = time.monotonic()
        rollouts: list[Rollout | None]
        try:
            rollouts = list(self.engine.generate(share))
            self._note(self.engine.metrics())
        except EngineLostError as error:
            self._lost = str(error)
            there = iter(error.rollouts)
            gone = set(error.missing)
            rollouts = [None if i in gone else next(there) for i in range(len(share))]
        self._tokens += sum(len(one.token_ids) for one in rollouts if one is not None)
        self._seconds += time.monotonic() - start
        return rollouts

    def _note(self, said: Mapping[str, float]) -> None:
        """Of one attempt; an engine may make several. What it counts, it counts itself."""
        for name, value in said.items():
            before = self._own.get(name, value)
            self._own[name] = max(before, value) if name.endswith("_max") else value

    def _load(self, *, everywhere: bool, check: bool) -> None:
        """Send to all engines, or to those that are lost; again to those lost meanwhile."""
        assert self._weights is not None, "send comes before generate"
        for _ in range(ATTEMPTS):
            reasons = {} if everywhere else self._lost_engines()
            if not everywhere:
                if not reasons:
                    return
                interrupt.raise_if_asked_anywhere()  # it may have ended them
            self._restarts += len(reasons)
            takes = self._seat is not None and (everywhere or self._seat.number in reasons)
            self._walk(takes, check)
            everywhere, check = False, True
        if reasons := self._lost_engines():
            raise RuntimeError(
                f"no engine could be kept alive with the weights of version "
                f"{self._weights.version}, after {ATTEMPTS} attempts: "
                + "; ".join(f"engine {n}: {why}" for n, why in reasons.items())
            )

    def _walk(self, takes: bool, check: bool) -> None:
        """All ranks gather the weights together; those that take part load them on the way."""
        assert self._weights is not None
        buckets, failure = self._buckets(takes), None
        if takes:
            assert self.engine is not None
            self._lost = ""
            try:
                self.engine.load_weights(buckets, self._weights.version, check=check)
            except EngineLostError as error:
                self._lost = str(error)
            except Exception:
                failure = traceback.format_exc()
        for _ in buckets:  # the rest of a walk that all ranks take together
            pass
        _raise_everywhere(failure)

    def _buckets(self, takes: bool) -> Iterator[Bucket]:
        """Asked for when an engine is there to take them, which may take it long to be."""
        assert self._weights is not None
        together.meet()  # for whoever waits in what comes now has a deadline
        yield from self._weights.weight_buckets(takes=takes)

    def _lost_engines(self) -> dict[int, str]:
        """Why, by number of the engine."""
        mine = (self._seat.number, self._lost) if self._seat is not None and self._lost else None
        everywhere = together.from_every_rank(mine)
        return dict(entry for entry in everywhere if entry is not None)

    def _compare(self, weights: Weights) -> None:
        trainer = weights.score_plainly(self._probe)
        found, failure = 0.0, None
        if self.engine is not None and self._seat is not None and self._seat.is_owner:
            try:
                result = gap(self._probe, self.engine.score(self._probe), trainer)
                found = result.mean
                if not found <= self._max_probe_gap:
                    failure = (
                        f"engine {self._seat.number} and the trainer disagree on the same weights: "
                        f"their log-probs differ by {found:.4g} on average, more than "
                        f"{self._max_probe_gap:.4g} (rollout.sync.probe_gap); the worst: "
                        f"{result.worst}"
                    )
            except Exception:
                failure = traceback.format_exc()
        self._probe_gap = max(together.from_every_rank(found))
        _raise_everywhere(failure)

    def _gather_metrics(self) -> list[str]:
        """Adds up what the engines say (`_max` in a name: the largest); why any of them is lost."""
        own = dict(self._own)
        if _RATE in own:
            own[_RATE] = self._tokens / self._seconds
        everywhere = together.from_every_rank((own, self._lost))
        self._metrics = {}
        for name in sorted({name for metrics, _ in everywhere for name in metrics}):
            values = [metrics[name] for metrics, _ in everywhere if name in metrics]
            self._metrics[name] = max(values) if name.endswith("_max") else sum(values)
        return [why for _, why in everywhere if why]


def _raise_everywhere(failure: str | None) -> None:
    """What one rank raises is raised on every rank: nobody is left waiting."""
    for rank, one in enumerate(together.from_every_rank(failure)):
        if one is not None:
            raise RuntimeError(f"rank {rank} failed: {one}")
