"""Weights on their way from a trainer rank to the workers of an engine. Imports no vllm.

A channel is one trainer rank and the workers it feeds: a TCPStore on the trainer's side for small
things (headers, acknowledgements, failures) and a transport for the bytes. Every update has a
number; its keys in the store start with it. Per bucket the trainer writes a header, then the bytes
travel; a last header ends the update with the number of buckets. After a failure nothing more
comes: the engine is discarded anyway.

Transports: `gloo` (CPU) and `nccl` broadcast each bucket among the ends of the channel; `ipc` lets
the worker on the same GPU map the trainer's memory, and waits for its acknowledgement. `nccl` and
`ipc` were not yet run on a GPU.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from megasd.rollout.vllm import nccl
from megasd.weights.bucket import Bucket, checksums

TransportKind = Literal["gloo", "nccl", "ipc"]
FAILED = "failed"  # a key that anybody sets: whoever waits on the channel gives up
POLL_SECONDS = 2e-4
LOOK_SECONDS = 0.1  # between looks for FAILED


class TransferError(RuntimeError):
    """Bytes did not arrive, or not as they were sent. The engine is not usable any more."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What an engine has to know to join a channel. It travels as plain values."""

    kind: TransportKind
    host: str
    port: int
    workers: tuple[int, ...]  # ranks within the engine, in the order of their places
    timeout_seconds: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Header:
    """One bucket: which tensors its bytes are, without gaps."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    checksums: list[int] | None  # None: not compared this time
    memory: dict[str, Any] | None = None  # ipc: where the bytes lie
    end: int | None = None  # buckets of the update, in its last header

    @classmethod
    def of(cls, bucket: Bucket, check: bool, memory: dict[str, Any] | None) -> "Header":
        tensors = bucket.tensors
        return cls(
            names=list(tensors),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            shapes=[list(tensor.shape) for tensor in tensors.values()],
            checksums=checksums(tensors.values()) if check else None,
            memory=memory,
        )

    @classmethod
    def last(cls, buckets: int) -> "Header":
        return cls([], [], [], None, end=buckets)

    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [
            math.prod(shape) * getattr(torch, dtype).itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def split(self, raw: Tensor) -> dict[str, Tensor]:
        """The tensors as views of `raw` [bytes]."""
        parts = zip(self.names, raw.split(self.sizes()), self.dtypes, self.shapes, strict=True)
        return {
            name: part.view(getattr(torch, dtype)).view(shape) for name, part, dtype, shape in parts
        }


class Arrivals:
    """Which tensors of an update came. `errors`: unknown, twice, or of the wrong shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.missing = set(shapes)
        self.errors: list[str] = []

    def take(self, bucket: Bucket) -> None:
        for name, tensor in bucket.tensors.items():
            if name not in self.missing:
                self.errors.append(f"{name} is unknown or came twice")
            elif tensor.shape != self._shapes[name]:
                expected = tuple(self._shapes[name])
                self.errors.append(f"{name} has shape {tuple(tensor.shape)} instead of {expected}")
            self.missing.discard(name)


class Channel:
    """The trainer's end. All calls but `join` and `send` return at once."""

    def __init__(
        self,
        kind: TransportKind,
        host: str,  # of this rank, as the engine reaches it
        workers: Sequence[int],
        *,
        device: torch.device,
        timeout_seconds: int,
    ) -> None:
        self._device = device
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store = TCPStore(
            host, 0, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        self.feed = Feed(
            kind=kind,
            host=host,
            port=self._store.port,
            workers=tuple(workers),
            timeout_seconds=timeout_seconds,
        )
        self._group: Any = None
        self._update = ""
        self._sent = 0
        self._old_keys: list[str] = []

    def join(self) -> None:
        """Collective with the workers of the channel."""
        if self.feed.kind != "ipc":
            self._group = _group(self.feed, self._store, 0, self._device, self._patience)

    def begin(self, update: int) -> None:
        for key in self._old_keys:
            self._store.delete_key(key)
        self._update, self._sent, self._old_keys = f"{update}", 0, []

    def send(
        self, bucket: Bucket, *, check: bool, tamper: Callable[[Bucket], None] | None = None
    ) -> None:
        """Returns when the bucket's memory may be written again. Raises TransferError."""
        memory = _export(bucket.flat) if self.feed.kind == "ipc" else None
        header = Header.of(bucket, check, memory)
        if tamper is not None:
            tamper(bucket)
            if bucket.flat.is_cuda:
                torch.cuda.synchronize(bucket.flat.device)  # the worker reads by itself
        number, self._sent = self._sent, self._sent + 1
        self._put(f"{self._update}/{number}", header)
        if self.feed.kind == "ipc":
            self._await_acknowledgements(number)
            return
        try:
            self._group.broadcast(bucket.flat.view(torch.uint8), self._patience)
        except RuntimeError as error:
            raise TransferError(str(error)) from error

    def end(self) -> None:
        self._put(f"{self._update}/{self._sent}", Header.last(self._sent))

    def _put(self, key: str, header: Header) -> None:
        self._store.set(key, json.dumps(asdict(header)))
        self._old_keys.append(key)

    def _patience(self) -> Iterator[None]:
        return _patiently(self._timeout, self._look)

    def _await_acknowledgements(self, number: int) -> None:
        keys = [f"{self._update}/{number}/{worker}" for worker in self.feed.workers]
        self._old_keys += keys
        for _ in self._patience():
            if self._store.check(keys):
                return

    def _look(self) -> None:
        if self._store.check([FAILED]):
            raise TransferError(self._store.get(FAILED).decode())

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()  # a peer that died would be waited for
        self._group = None


def announce_failure(feed: Feed, reason: str) -> None:
    """Lets whoever waits on the channel give up. From any process or thread."""
    store = TCPStore(feed.host, feed.port, timeout=timedelta(seconds=10), wait_for_workers=False)
    store.set(FAILED, reason)


class Receiver:
    """A worker's end. `worker` is its rank within the engine."""

    def __init__(self, feed: Feed, worker: int, device: torch.device) -> None:
        self._feed, self._worker, self._device = feed, worker, device
        self._timeout = timedelta(seconds=feed.timeout_seconds)
        self._store = TCPStore(feed.host, feed.port, timeout=self._timeout, wait_for_workers=False)
        self._group: Any = None
        if feed.kind != "ipc":
            place = 1 + feed.workers.index(worker)
            self._group = _group(feed, self._store, place, device, self._patience)

    def buckets(self, update: int) -> Iterator[dict[str, Tensor]]:
        """Tensors of each bucket by name, in memory that stays theirs.

        Walks to the end whatever was wrong with a bucket, so that nobody waits for this worker,
        and raises TransferError after it.
        """
        errors: list[str] = []
        for number in range(10**9):
            header = Header(**json.loads(self._store.get(f"{update}/{number}")))
            if header.end is not None:
                assert header.end == number, "the last header stands after all buckets"
                break
            raw = self._bytes(header)
            tensors = header.split(raw)
            errors += self._differences(header, tensors)
            if self._feed.kind == "ipc":
                self._store.set(f"{update}/{number}/{self._worker}", "")
            if not errors:
                yield tensors
        if errors:
            raise TransferError("; ".join(errors))

    def _bytes(self, header: Header) -> Tensor:
        if header.memory is not None:
            shared = _import(header.memory, self._device)
            raw = shared.clone()
            torch.cuda.synchronize(self._device)  # before the trainer writes there again
            return raw
        raw = torch.empty(sum(header.sizes()), dtype=torch.uint8, device=self._device)
        self._group.broadcast(raw, self._patience)
        return raw

    def _patience(self) -> Iterator[None]:
        return _patiently(self._timeout, lambda: None)  # whose trainer goes, ends as a process

    def _differences(self, header: Header, tensors: Mapping[str, Tensor]) -> list[str]:
        if header.checksums is None:
            return []
        arrived = checksums(tensors.values())
        return [
            f"{name} arrived at worker {self._worker} with another checksum than it was sent with"
            for name, sent, found in zip(tensors, header.checksums, arrived, strict=True)
            if found != sent
        ]


class _Gloo:
    """A process group outside of torch's list of groups."""

    def __init__(self, members: PrefixStore, place: int, size: int, timeout: timedelta) -> None:
        self._group: Any = dist.ProcessGroupGloo(members, place, size, timeout)

    def broadcast(self, raw: Tensor, waits: Callable[[], Iterator[None]]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        work = self._group.broadcast([raw], options)
        for _ in waits():
            if work.is_completed():
                break
        work.wait()

    def abort(self) -> None:
        """It has no thread that would end a process: it may go by itself."""


def _group(
    feed: Feed,
    store: TCPStore,
    place: int,
    device: torch.device,
    waits: Callable[[], Iterator[None]],
) -> _Gloo | nccl.Communicator:
    """What the channel broadcasts with; the trainer is place 0."""
    size, members = 1 + len(feed.workers), PrefixStore("group", store)
    if feed.kind == "gloo":
        return _Gloo(members, place, size, timedelta(seconds=feed.timeout_seconds))
    if place == 0:
        members.set("id", nccl.unique_id().hex())
    return nccl.Communicator(bytes.fromhex(members.get("id").decode()), place, size, device, waits)


def _patiently(timeout: timedelta, look: Callable[[], None]) -> Iterator[None]:
    """Ticks until the caller has seen what it waits for; `look` raises to give up earlier."""
    start = looked = time.monotonic()
    while (now := time.monotonic()) - start < timeout.total_seconds():
        if now - looked > LOOK_SECONDS:
            look()
            looked = now
        yield
        time.sleep(POLL_SECONDS)
    raise TransferError(
        f"no sign of the other end of the channel for {timeout.total_seconds():.0f} s"
    )


def _export(flat: Tensor) -> dict[str, Any]:
    """Where the bytes of a CUDA tensor lie, for another process on the same GPU; plain values.

    Not pickled: whoever can write to the store must not be able to run code in a worker.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    torch.cuda.synchronize(flat.device)  # what is written there must be there
    rebuild: Any
    arguments: Any
    rebuild, arguments = reduce_tensor(flat.view(torch.uint8))
    assert rebuild.__name__ == "rebuild_cuda_tensor"
    plain = [value.hex() if isinstance(value, bytes) else value for value in arguments[6:]]
    return {
        "gpu": str(torch.cuda.get_device_properties(flat.device).uuid),
        "elements": arguments[1][0],
        "offset": arguments[3],
        "storage": plain,
    }


def _import(memory: Mapping[str, Any], device: torch.device) -> Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    own = str(torch.cuda.get_device_properties(device).uuid)
    if memory["gpu"] != own:
        raise TransferError(
            f"the trainer's weights lie on GPU {memory['gpu']}, this worker's GPU is {own}: "
            "a colocated engine must run on the GPUs of its trainer ranks, in their order"
        )
    _, handle, size, offset, grad, counter, counter_offset, event, sync = memory["storage"]
    return rebuild_cuda_tensor(
        Tensor,
        (memory["elements"],),
        (1,),
        memory["offset"],
        torch.storage.TypedStorage,
        torch.uint8,
        device.index,
        bytes.fromhex(handle),
        size,
        offset,
        grad,
        bytes.fromhex(counter),
        counter_offset,
        bytes.fromhex(event),
        sync,
    )
