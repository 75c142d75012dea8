"""Both ends of a channel in one process: what is sent is what arrives, or it is named."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megasd.rollout.vllm.send import (
    Arrivals,
    Channel,
    Receiver,
    TransferError,
    announce_failure,
)
from megasd.weights.bucket import Bucket
from megasd.weights.fp8 import quantized

CPU = torch.device("cpu")


def both(trainer: Callable[[], None], *workers: Callable[[], Any]) -> list[Any]:
    """Runs all at the same time; what each worker returned, or raised."""
    results: list[Any] = [None] * len(workers)

    def work(i: int) -> None:
        try:
            results[i] = workers[i]()
        except TransferError as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(workers))]
    for thread in threads:
        thread.start()
    trainer()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def joined() -> tuple[Channel, list[Receiver]]:
    """A channel to workers 2 and 3 of an engine."""
    channel = Channel("gloo", "127.0.0.1", [2, 3], device=CPU, timeout_seconds=20)
    feed = channel.feed
    receivers = both(channel.join, *(lambda w=w: Receiver(feed, w, CPU) for w in (2, 3)))
    return channel, receivers


def bucket(seed: int, dtype: torch.dtype = torch.bfloat16) -> Bucket:
    memory = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Bucket.over(memory, {f"{seed}.q_proj.weight": (30, 20), f"{seed}.norm": (17,)})


def received(receiver: Receiver, update: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in receiver.buckets(update):
        tensors |= part
    return tensors


def test_buckets_of_any_dtypes_arrive_bit_by_bit_over_several_updates(joined: Any) -> None:
    channel, receivers = joined
    updates = [
        [bucket(0), bucket(1)],
        [bucket(2, torch.float32)],
        [quantized(bucket(3)), quantized(bucket(4))],
    ]
    for number, buckets in enumerate(updates):

        def send(number: int = number, buckets: list[Bucket] = buckets) -> None:
            channel.begin(number)
            for one in buckets:
                channel.send(one, check=True)
            channel.end()

        got = both(send, *(lambda r=r, n=number: received(r, n) for r in receivers))
        for tensors in got:
            wanted = {name: tensor for one in buckets for name, tensor in one.tensors.items()}
            assert list(tensors) == list(wanted)
            for name, tensor in wanted.items():
                assert tensors[name].dtype == tensor.dtype
                assert tensors[name].shape == tensor.shape
                assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_wrong_byte_is_named_after_the_walk_and_only_when_checksums_travel(joined: Any) -> None:
    channel, receivers = joined

    def flip(bucket: Bucket) -> None:
        if "1.norm" in bucket.tensors:
            bucket.tensors["1.norm"].view(torch.uint8)[3] ^= 1

    for number, check in enumerate((True, False)):

        def send(number: int = number, check: bool = check) -> None:
            channel.begin(number)
            for seed in range(3):
                channel.send(bucket(seed), check=check, tamper=flip)
            channel.end()

        got = both(send, *(lambda r=r, n=number: received(r, n) for r in receivers))
        if check:
            assert [str(error) for error in got] == [
                f"1.norm arrived at worker {worker} with another checksum than it was sent with"
                for worker in (2, 3)
            ]
        else:
            assert [len(tensors) for tensors in got] == [6, 6]


def test_whoever_waits_on_a_channel_gives_up_when_a_failure_is_announced(joined: Any) -> None:
    """The workers read nothing, as if they were dead; more is sent than a socket holds."""
    channel, _ = joined
    large = torch.zeros(2**25)
    start = time.monotonic()
    threading.Timer(0.3, announce_failure, [channel.feed, "the engine was killed"]).start()
    channel.begin(0)
    with pytest.raises(TransferError, match="the engine was killed"):
        channel.send(Bucket({"x": large}, large), check=False)
    assert time.monotonic() - start < 10


def test_a_silent_worker_is_an_error_after_the_timeout() -> None:
    channel = Channel("gloo", "127.0.0.1", [0], device=CPU, timeout_seconds=1)
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        channel.join()


def test_arrivals_name_what_is_missing_unknown_doubled_or_misshapen() -> None:
    shapes = {"0.q_proj.weight": (30, 20), "0.norm": (16,), "5.norm": (17,)}
    arrivals = Arrivals(shapes)
    arrivals.take(bucket(0))
    arrivals.take(Bucket({"0.q_proj.weight": torch.zeros(30, 20)}, torch.zeros(600)))
    arrivals.take(Bucket({"other": torch.zeros(2)}, torch.zeros(2)))
    assert arrivals.errors == [
        "0.norm has shape (17,) instead of (16,)",
        "0.q_proj.weight is unknown or came twice",
        "other is unknown or came twice",
    ]
    assert arrivals.missing == {"5.norm"}
