"""The `vllm` engine, seen from the trainer: a process of its own, fed with weights in place.

This module imports no vllm. What runs where:

    VLLMEngine (here)  -- Link: commands, responses, a beat each second -->  process.py: vLLM
         |                                                                       |
         +-- Channel (transfer.py): the bytes of the weights ------------->  its workers

A process that dies, hangs or fails is discarded: its group is killed, and the next `load_weights`
starts another one, with the next incarnation number.
"""

import itertools
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megasd.process import interrupt, together
from megasd.process.memory import give_back_cached_memory
from megasd.process.waiting import first_of, waiting_for
from megasd.rollout.config import VLLMConfig
from megasd.rollout.engine import EngineLostError, Request, response_text, stop_ids
from megasd.rollout.vllm.link import (
    CLOSED,
    AgentHost,
    Host,
    Link,
    LocalHost,
    last_lines,
    own_address,
)
from megasd.rollout.vllm.options import engine_options, visible_device
from megasd.rollout.vllm.sampling import asked
from megasd.rollout.vllm.send import Arrivals, Channel, Feed, TransportKind, announce_failure
from megasd.types import Rollout
from megasd.weights.bucket import Bucket
from megasd.weights.fp8 import quantized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _LostError(Exception):
    """The process cannot be used any more; the text says why."""


class VLLMEngine:
    """One engine, and this rank's part in feeding it.

    `engine_size` trainer ranks feed it: one feeds every worker, or, when there are `config.tensor`
    of them, rank i feeds worker i. `load_weights`, `sleep` and `close` are called by all of them;
    `generate`, `score` and `metrics` by the owner only, `rank_in_engine` 0, which has the process.

    Log-probs are float32, of the distribution that was sampled from: after temperature, min-p,
    top-k and top-p, in this order. Temperature 0 takes the most likely token; its log-prob is then
    that of temperature 1.
    """

    def __init__(
        self,
        config: VLLMConfig,
        folder: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        dtype: torch.dtype,  # of the buckets
        device: torch.device,
        hf_shapes: Mapping[str, tuple[int, ...]],  # every tensor that an update consists of
        max_tokens: int,  # of a prompt and its response
        run_folder: str | Path,
        name: str,
        rank_in_engine: int = 0,
        engine_size: int = 1,
        group: dist.ProcessGroup | None = None,  # of the ranks that feed it; None: this one
    ) -> None:
        if engine_size not in (1, config.tensor):
            raise ValueError(
                f"{engine_size} trainer ranks cannot feed an engine of {config.tensor} workers: "
                "one rank feeds them all, or each rank one of them"
            )
        self._config, self._device, self._name = config, device, name
        self._tokenizer, self._stop_ids = tokenizer, stop_ids(folder, tokenizer)
        self._shapes = dict(hf_shapes)
        self._rank, self._size, self._group = rank_in_engine, engine_size, group
        self._options = engine_options(
            config, folder, dtype=dtype, device=device, max_tokens=max_tokens, hf_shapes=hf_shapes
        )
        engines = Path(run_folder) / "engines"
        self._log, self._agent_file = engines / f"{name}.log", engines / f"{name}.json"
        self._link: Link | None = None
        self._channel: Channel | None = None
        self._joined = 0  # the incarnation that the channel leads to
        self._version: int | None = None  # None: no weights, or not all of them
        self._calls, self._updates = itertools.count(), itertools.count()
        self._started = 0  # processes so far
        self._stale = 0  # responses that nobody waits for any more
        self._peaks = {"waiting": 0.0, "cache": 0.0}  # of the last call
        self._metrics: dict[str, float] = {}
        self.tamper: Callable[[Bucket], None] | None = None  # for tests: changes bytes in flight
        self._host: Host = LocalHost(self._log)
        if config.placement == "server":
            self._host = AgentHost(self._agent_file, config.start_timeout_seconds)
        self._shares_gpus = device.type == "cuda" and config.placement == "colocated"
        self._environment: dict[str, str] = {}
        if self._shares_gpus:
            devices = self._gather(visible_device(device))
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        # Of all its ranks: its workers, and those of theirs, would crowd on the owner's.
        self._cpus = sorted(set().union(*self._gather(os.sched_getaffinity(0))))
        failure = self._together(self._make_room) or self._together(self._start)
        if self._shares_gpus:  # vLLM measures free memory as it starts: nobody may take any
            failure = failure or self._together(self._await_ready)
        if failure:
            self.close()
            raise RuntimeError(failure)
        self.sleep()

    # ---- weights -------------------------------------------------------------------------------

    def load_weights(self, buckets: Iterable[Bucket], version: int, *, check: bool = True) -> None:
        self._version = None
        update = next(self._updates)
        no_engine = self._together(self._make_room) or self._together(self._revive)
        failure = no_engine or self._join() or self._together(lambda: self._begin(update, version))
        arrivals = Arrivals(self._shapes)
        sending = None if failure else self._channel
        own_failure = ""
        for bucket in buckets:  # to the end whatever is wrong: gathering them is collective
            arrivals.take(bucket)
            if sending is None or arrivals.errors:
                continue
            try:
                travels = quantized(bucket) if self._config.quantization == "fp8" else bucket
                sending.send(travels, check=check, tamper=self.tamper)
            except RuntimeError as error:
                own_failure, sending = self._why(error), None
        incomplete = self._incomplete(arrivals)
        failure = failure or "; ".join(filter(None, self._gather(own_failure)))
        if not failure and not incomplete:
            failure = self._together(self._end)
        if failure or incomplete:
            lost = self._discard(f"weights of version {version}: {incomplete or failure}")
            kind = RuntimeError if incomplete or no_engine else EngineLostError
            raise kind(lost)
        self._version = version

    def _make_room(self) -> None:
        """On every rank before the engine starts or wakes on its GPU, which takes what is free."""
        if self._shares_gpus:
            give_back_cached_memory()

    def _revive(self) -> None:
        """A process that is there and can be asked for something."""
        if self._rank != 0:
            return
        link = self._link
        if link is None or link.lost or time.monotonic() - link.last_sign > self._patience:
            self._discard("it is started again")
            self._start()
        self._await_ready()

    def _join(self) -> str:
        """Channels to an incarnation that has none yet. Returns what went wrong."""
        incarnation, node = self._gather((self._started, self._host.node))[0]
        if self._joined == incarnation:
            return ""
        if failure := self._together(lambda: self._open_channel(node)):
            return failure
        assert self._channel is not None
        feeds = self._gather(self._channel.feed)
        failure = self._together(lambda: self._join_channel(feeds))
        self._joined = 0 if failure else incarnation
        return failure

    def _open_channel(self, node: str) -> None:
        """`node`: of the engine, as its owner, who alone speaks with its host, found it."""
        workers = range(self._config.tensor) if self._size == 1 else [self._rank]
        other: TransportKind = "nccl" if self._device.type == "cuda" else "gloo"
        kind = "ipc" if self._shares_gpus else other
        if self._channel is not None:
            self._channel.close()
        self._channel = Channel(
            kind,
            own_address(node) if node else "127.0.0.1",
            workers,
            device=self._device,
            timeout_seconds=self._config.timeout_seconds,
        )

    def _join_channel(self, feeds: Sequence[Feed]) -> None:
        """Trainer and workers join at the same time; each channel has one trainer rank only."""
        assert self._channel is not None
        if self._link is not None:
            self._link.on_lost = lambda reason: _announce(feeds, reason)
            self._link.send("join", [feed.plain() for feed in feeds])
        self._channel.join()
        if self._link is not None:
            self._await("joined")

    def _begin(self, update: int, version: int) -> None:
        assert self._channel is not None
        self._channel.begin(update)
        if self._link is not None:
            self._link.send("update", {"number": update, "version": version})

    def _end(self) -> None:
        assert self._channel is not None
        self._channel.end()
        if self._link is not None:
            self._await("updated")

    def _incomplete(self, arrivals: Arrivals) -> str:
        """What is wrong with the tensors themselves, on any rank that feeds the engine."""
        everywhere = self._gather((arrivals.errors, arrivals.missing))
        errors = {error: None for errors, _ in everywhere for error in errors}
        nowhere = set.intersection(*(missing for _, missing in everywhere))
        return "; ".join([*errors, *(f"{name} is missing" for name in sorted(nowhere))])

    # ---- responses -----------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        version = self._current_version()
        rollouts: dict[int, Rollout] = {}
        start = time.monotonic()
        finished: list[float] = []
        try:
            with waiting_for(lambda: f"{self._name}: {_missing(requests, rollouts)}"):
                prompts = [asked(request, self._stop_ids) for request in requests]
                for i, response in self._ask(prompts, may_stop=True):
                    if response["finish_reason"] not in ("stop", "length"):  # "abort", "error"
                        raise _LostError(
                            f"it ended {requests[i].name} with {response['finish_reason']!r}"
                        )
                    rollouts[i] = self._rollout(requests[i], response, version)
                    finished.append(time.monotonic() - start)
        except _RefusedError as refused:
            raise ValueError(
                f"{requests[refused.index].name}: vLLM refuses the request: {refused}"
            ) from None
        except _LostError as lost:
            missing = [i for i in range(len(requests)) if i not in rollouts]
            raise EngineLostError(
                self._discard(f"{lost}; without a response: {_missing(requests, rollouts)}"),
                rollouts=[rollouts[i] for i in sorted(rollouts)],
                missing=missing,
            ) from None
        self._measure(rollouts.values(), finished)
        return [rollouts[i] for i in range(len(requests))]

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._current_version()
        sampling = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        scores: dict[int, np.ndarray] = {}
        try:
            for i, response in self._ask([(one.tolist(), sampling) for one in sequences]):
                scores[i] = response["logprobs"]
        except _RefusedError as refused:
            raise ValueError(f"vLLM refuses sequence {refused.index}: {refused}") from None
        except _LostError as lost:
            raise EngineLostError(
                self._discard(f"{lost}, while it scored {len(sequences)} sequences"),
                missing=range(len(sequences)),
            ) from None
        return [scores[i] for i in range(len(sequences))]

    def _ask(
        self, prompts: Sequence[tuple[list[int], dict[str, Any]]], *, may_stop: bool = False
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, response) as they finish. `prompts`: token ids and how to go on."""
        link = self._link
        assert link is not None
        call = next(self._calls)
        ids = {f"{call}.{i}": i for i in range(len(prompts))}
        link.send(
            "generate",
            [
                {"id": request, "token_ids": token_ids, "sampling": sampling}
                for request, (token_ids, sampling) in zip(ids, prompts, strict=True)
            ],
        )
        start = time.monotonic()
        try:
            while ids:
                kind, content = self._next(lambda: max(start, link.last_step), may_stop=may_stop)
                if kind not in ("response", "refused"):
                    continue
                now = (link.incarnation, self._version)
                current = kind == "refused" or (content["incarnation"], content["version"]) == now
                if content["id"] not in ids or not current:
                    self._stale += 1
                elif kind == "refused":
                    raise _RefusedError(ids[content["id"]], content["error"])
                else:
                    self._peaks = content["peaks"]  # since the call began
                    yield ids.pop(content["id"]), content
        finally:
            if ids:
                link.send("abort")

    def _rollout(self, request: Request, response: dict[str, Any], version: int) -> Rollout:
        token_ids, logprobs = response["token_ids"], response["logprobs"]
        if not np.isfinite(logprobs).all():
            raise RuntimeError(
                f"the weights of version {version} give log-probs that are not finite"
            )
        assert len(logprobs) == len(token_ids), "one log-prob per token"
        return Rollout(
            prompt=request.prompt,
            group_id=request.group_id,
            sample=request.sample,
            token_ids=token_ids,
            logprobs=logprobs,
            text=response_text(self._tokenizer, token_ids),
            finish_reason=response["finish_reason"],
            policy_version=version,
        )

    def _current_version(self) -> int:
        if self._version is None:
            raise RuntimeError("the engine has no complete weights: call load_weights first")
        return self._version

    def _measure(self, rollouts: Iterable[Rollout], finished: Sequence[float]) -> None:
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        tail = finished[-1] - finished[int(0.9 * (len(finished) - 1))] if finished else 0.0
        self._metrics = {
            "engine/tokens_per_second": tokens / finished[-1] if finished else 0.0,
            "engine/queue_max": self._peaks["waiting"],
            "engine/cache_max": self._peaks["cache"],
            "engine/tail_seconds_max": tail,
            "engine/stale": float(self._stale),
            "engine/restarts": float(self._started - 1),
        }

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    # ---- the process ---------------------------------------------------------------------------

    def sleep(self) -> None:
        """Of an engine that shares the trainer's GPUs; one of nodes of its own stays as it is."""
        if self._config.placement == "server":
            return
        self._version = None
        if self._shares_gpus:
            failure = self._together(self._fall_asleep)
            if failure:  # one that is gone has given its memory back too
                self._discard(failure)

    def _fall_asleep(self) -> None:
        if self._link is not None:
            self._link.send("sleep")
            self._await("asleep")

    def close(self) -> None:
        self._version = None
        self._discard("it was closed")
        self._host.close()

    def _start(self) -> None:
        if self._rank != 0:
            return
        self._started += 1
        link = Link(self._started, self._host.listen_on())
        job = {"options": self._options, "environment": self._environment}
        if self._config.placement == "colocated":
            job["cpus"] = self._cpus
        try:
            self._host.start(job | link.address())
        except BaseException:
            link.close()
            raise
        self._link = link

    def _await_ready(self) -> None:
        if self._link is not None and self._link.pid is None:
            self._link.pid = self._await("ready", seconds=self._config.start_timeout_seconds)

    @property
    def pid(self) -> int | None:
        """Of the engine process; None while there is none that is ready."""
        return None if self._link is None else self._link.pid

    def _await(self, wanted: str, seconds: float | None = None) -> Any:
        """Until the process has done what it was asked for; `seconds`: no later than that.

        What counts is what it gets done: its heart beats whatever it hangs in.
        """
        link, start = self._link, time.monotonic()
        assert link is not None
        while True:
            kind, content = self._next(
                lambda: max(start, link.last_step) if seconds is None else start,
                self._patience if seconds is None else seconds,
            )
            if kind == wanted:
                return content
            self._stale += kind == "response"

    def _next(
        self, last_sign: Callable[[], float], patience: float | None = None, may_stop: bool = False
    ) -> tuple[str, Any]:
        """The next message; raises _LostError when there will be none."""
        link, patience = self._link, self._patience if patience is None else patience
        assert link is not None
        while True:
            if may_stop:
                interrupt.raise_if_asked()
            try:
                return link.inbox.get(timeout=0.5)
            except queue.Empty:
                pass
            lost = self._cause()
            if lost is not None and link.inbox.empty():
                raise _LostError(lost)
            if time.monotonic() - last_sign() > patience:
                raise _LostError(f"it gave no sign of life for {patience:.0f} s")

    @property
    def _patience(self) -> float:
        return self._config.timeout_seconds

    def _discard(self, reason: str) -> str:
        """Ends the process, if there is one; returns the reason with what there is to know."""
        if self._channel is not None:
            self._channel.close()
        self._channel, self._joined, self._version = None, 0, None
        if self._link is None:
            return f"{self._name}: {reason}"
        incarnation = self._link.incarnation
        self._link.on_lost = None
        self._host.fence()
        self._link.close()
        self._link = None
        return f"{self._name} (incarnation {incarnation}): {reason}\n{last_lines(self._log)}"

    def _cause(self) -> str | None:
        """Why the process is gone, in its own words where it had any; None while it is there."""
        assert self._link is not None
        if not self._link.connected:
            return self._host.death()
        if self._link.lost != CLOSED:
            return self._link.lost
        for _ in range(40):  # a connection closes before the end of its process can be seen
            if death := self._host.death():
                return death
            time.sleep(0.05)
        return CLOSED

    def _why(self, error: Exception) -> str:
        """The process's own reason where there is one: a broken transport only follows from it."""
        if self._link is not None and not isinstance(error, _LostError):
            for _ in range(20):
                if self._link.lost is not None:
                    return self._cause() or str(error)
                time.sleep(0.05)
        return str(error)

    # ---- the ranks that feed one engine --------------------------------------------------------

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        return together.from_every_rank(value, self._group)

    def _together(self, work: Callable[[], None]) -> str:
        """Done on every rank; returns what went wrong on any of them, and "" where nothing did."""
        failure = ""
        try:
            work()
        except (_LostError, RuntimeError, OSError) as error:
            failure = self._why(error)
        return "; ".join(filter(None, self._gather(failure)))


class _RefusedError(Exception):
    """vLLM does not take a request."""

    def __init__(self, index: int, error: str) -> None:
        super().__init__(error)
        self.index = index


def _missing(requests: Sequence[Request], rollouts: Mapping[int, Rollout]) -> str:
    return first_of([one.name for i, one in enumerate(requests) if i not in rollouts])


def _announce(feeds: Sequence[Feed], reason: str) -> None:
    for feed in feeds:
        try:
            announce_failure(feed, reason)
        except RuntimeError:  # its rank is gone: nobody waits there
            continue
