"""How a broadcast waits for peers that die, on a library that only plays NCCL."""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasd.rollout.vllm import nccl
from megasd.rollout.vllm.send import Channel, TransferError
from megasd.weights.bucket import Bucket

CPU = torch.device("cpu")


class Library:
    """`joins`: peers come; `completes`: bytes arrive; `error`: what becomes of the connection."""

    def __init__(self, *, joins: bool = True, error: int = 0) -> None:
        self.joins, self.error = joins, error
        self.done = True
        self.sent: list[tuple[int, int]] = []
        self.aborted = threading.Event()

    def ncclGetUniqueId(self, made: Any) -> int:  # noqa: N802
        made._obj.internal[0] = 42
        return 0

    def ncclCommInitRank(self, comm: Any, size: int, unique: Any, place: int) -> int:  # noqa: N802
        assert (size, unique.internal[0], place) == (3, 42, 0)
        if not self.joins:
            time.sleep(60)
        comm._obj.value = 99
        return 0

    def ncclBroadcast(self, here: int, there: int, *rest: Any) -> int:  # noqa: N802
        count, kind, root, comm, _ = rest
        assert (here, kind, root, comm.value) == (there, 1, 0, 99)
        self.sent.append((here, count))
        return 0

    def ncclCommGetAsyncError(self, comm: Any, found: Any) -> int:  # noqa: N802
        found._obj.value = self.error
        return 0

    def ncclCommAbort(self, comm: Any) -> int:  # noqa: N802
        assert comm.value == 99
        self.aborted.set()
        return 0

    def ncclGetErrorString(self, result: int) -> bytes:  # noqa: N802
        return {6: b"remote process exited"}[result]


@pytest.fixture
def open_channel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`open_channel(library)`: one of kind nccl, with two workers that nobody plays."""
    library: list[Library] = []
    event = SimpleNamespace(query=lambda: library[0].done, synchronize=lambda: None)
    stream = SimpleNamespace(
        wait_stream=lambda other: None, cuda_stream=7, record_event=lambda: event
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(nccl, "library", lambda: library[0])

    def never(*_: Any) -> None:
        raise AssertionError("its watchdog would end the trainer")

    monkeypatch.setattr(dist, "ProcessGroupNCCL", never, raising=False)

    def open_one(plays: Library, timeout: float = 20) -> Channel:
        library.append(plays)
        wait: Any = timeout
        return Channel("nccl", "127.0.0.1", [0, 1], device=CPU, timeout_seconds=wait)

    return open_one


def bucket() -> Bucket:
    flat = torch.zeros(10)
    return Bucket({"x": flat}, flat)


def test_bytes_are_sent_from_where_they_lie(open_channel: Any) -> None:
    library, one = Library(), bucket()
    channel = open_channel(library)
    channel.join()
    channel.begin(0)
    channel.send(one, check=False)
    assert library.sent[1:] == [(one.flat.data_ptr(), 40)], "behind the byte that connects"
    channel.close()
    assert library.aborted.wait(20)


def test_a_peer_that_dies_meanwhile_is_an_error_and_nothing_else(open_channel: Any) -> None:
    library = Library(error=6)
    channel = open_channel(library)
    channel.join()
    library.done = False
    channel.begin(0)
    with pytest.raises(TransferError, match="NCCL: remote process exited"):
        channel.send(bucket(), check=False)
    channel.close()
    assert library.aborted.wait(20)


@pytest.mark.parametrize("joins", [True, False])
def test_nobody_is_waited_for_longer_than_it_may_take(open_channel: Any, joins: bool) -> None:
    library = Library(joins=joins, error=7)  # in progress, for ever
    channel = open_channel(library, timeout=0.1)
    library.done = False

    def send() -> Iterator[None]:
        channel.join()
        channel.begin(0)
        channel.send(bucket(), check=False)
        yield

    with pytest.raises(TransferError, match="no sign of the other end"):
        next(send())
