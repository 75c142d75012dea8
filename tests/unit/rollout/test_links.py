"""Strangers, hangs and deaths between a trainer and its engines change nothing for the run."""

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megasd.rollout.config import VLLMConfig
from megasd.rollout.engine import EngineLostError, Request
from megasd.rollout.vllm import door as door_module
from megasd.rollout.vllm import engine as engine_module
from megasd.rollout.vllm import host as host_module
from megasd.rollout.vllm.door import Door, call
from megasd.rollout.vllm.engine import VLLMEngine
from megasd.rollout.vllm.host import Agent
from megasd.rollout.vllm.link import AgentHost, Link, LocalProcess, engine_environment
from megasd.rollout.vllm.send import Channel
from megasd.types import Prompt
from megasd.weights.bucket import Bucket
from tests.unit.rollout.played import PlayedHost, Player

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = {"a.weight": (4, 3), "b.weight": (5,)}
KEY = b"secret"


def buckets() -> Iterator[Bucket]:
    memory = torch.arange(12.0)
    for name, shape in SHAPES.items():
        yield Bucket.over(memory, {name: shape})


def requests() -> list[Request]:
    return [
        Request(
            prompt=Prompt(index=i, messages=(), token_ids=np.array([i, 9]), where=f"p.jsonl:{i}"),
            group_id=0,
            sample=0,
            seed=0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_response_tokens=2,
        )
        for i in range(3)
    ]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`make(host)`: an engine of one rank; its process is what the host plays."""
    (tmp_path / "generation_config.json").write_text("{}")  # of a model: only its tokenizer ends
    engines: list[VLLMEngine] = []

    def make_one(host: Any = None, *, device: torch.device = CPU, **settings: Any) -> VLLMEngine:
        if host is not None:
            monkeypatch.setattr(engine_module, "LocalHost", lambda log: host)
        bounds: dict[str, Any] = {"timeout_seconds": 20, "start_timeout_seconds": 20}
        tokenizer: Any = SimpleNamespace(eos_token_id=1, decode=lambda ids, **_: f"{ids}")
        engine = VLLMEngine(
            VLLMConfig(**bounds | settings),
            tmp_path,
            tokenizer,
            dtype=torch.float32,
            device=device,
            hf_shapes=SHAPES,
            max_tokens=64,
            run_folder=tmp_path,
            name="engine0",
        )
        engines.append(engine)
        return engine

    yield make_one
    for engine in engines:
        engine.close()


def works(engine: VLLMEngine, version: int) -> bool:
    engine.load_weights(buckets(), version)
    return [one.policy_version for one in engine.generate(requests())] == [version] * 3


# ---- strangers -----------------------------------------------------------------------------------


class Strangers:
    """Knock on every port that this process opens, once in each way."""

    def __init__(self) -> None:
        self.silent: list[socket.socket] = []
        self.knocked: set[int] = set()

    def __call__(self, *_: Any) -> None:
        for end in psutil.Process().net_connections("tcp"):
            if end.status != psutil.CONN_LISTEN or end.laddr.port in self.knocked:
                continue
            self.knocked.add(end.laddr.port)
            for said in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\0\0\x10" + os.urandom(16)):
                with suppress(OSError), self._dial(end.laddr) as caller:
                    caller.sendall(said)
            self._dial(end.laddr).close()
            self.silent.append(self._dial(end.laddr))

    def _dial(self, address: Any) -> socket.socket:
        return socket.create_connection(address, timeout=5)


@pytest.fixture
def strangers() -> Iterator[Strangers]:
    there = Strangers()
    yield there
    for caller in there.silent:
        caller.close()


def test_strangers_on_every_port_leave_a_run_as_it_was(
    make: Any, tmp_path: Path, strangers: Strangers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's, the link's, the channel's: whatever listens when an engine does anything."""
    monkeypatch.setattr(host_module, "LocalProcess", lambda job, _: Player(job, before=strangers))
    agent = Agent("127.0.0.1", 0, tmp_path / "engines", "engine0")
    strangers()
    engine = make(placement="server")
    assert works(engine, 1)
    assert works(engine, 2)
    assert engine.metrics()["engine/restarts"] == 0
    assert len(strangers.knocked) >= 4, "agent, link, store, gloo"
    agent.close()


def greeted(monkeypatch: pytest.MonkeyPatch, **bounds: float) -> tuple[Door, list[Any]]:
    for name, value in bounds.items():
        monkeypatch.setattr(door_module, name, value)
    inside: list[Any] = []
    return Door("127.0.0.1", KEY, inside.append), inside


def test_however_many_say_nothing_who_knows_the_key_comes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    door, inside = greeted(monkeypatch, CALLERS=4)
    address: Any = door.address
    silent = [socket.create_connection(address) for _ in range(9)]
    assert call(address, KEY).writable
    assert until(lambda: len(inside) == 1)
    silent[0].settimeout(5)
    while silent[0].recv(99):  # a challenge, and the end: too many were waiting
        pass
    with pytest.raises(OSError, match="does not know the key"):
        call(address, b"another")
    assert len(inside) == 1
    door.close()
    for one in silent:
        one.close()


def test_who_says_nothing_is_sent_away_and_nobody_waits_for_a_silent_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door_module._greet, "__kwdefaults__", {"seconds": 0.2})
    door, _ = greeted(monkeypatch)
    address: Any = door.address
    with socket.create_connection(address) as caller:
        caller.settimeout(5)
        while caller.recv(99):
            pass
    door.close()
    with socket.create_server(("127.0.0.1", 0)) as service:
        start = time.monotonic()
        with pytest.raises(OSError, match="does not know the key"):
            call(service.getsockname(), KEY, seconds=0.2)
        assert time.monotonic() - start < 5


def test_a_link_needs_no_file_and_no_short_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 150 * "x")
    link = Link(1, None)
    address = json.loads(json.dumps(link.address()))
    call(address["address"], bytes.fromhex(address["key"]))
    assert until(lambda: link.connected)
    link.close()
    # Where vLLM would put sockets of its own.
    assert engine_environment({}, {})["VLLM_RPC_BASE_PATH"] == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert "VLLM_RPC_BASE_PATH" not in engine_environment({}, {})


def until(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


# ---- engines that hang, or end what they were asked for ------------------------------------------


@pytest.mark.parametrize("hangs_in", ["joined", "updated", "asleep"])
def test_an_engine_that_hangs_is_replaced_although_its_heart_beats(
    make: Any, hangs_in: str
) -> None:
    engine = make(PlayedHost(hangs_in=hangs_in), timeout_seconds=0.5)
    start = time.monotonic()
    if hangs_in == "asleep":
        assert works(engine, 0)
        engine._shares_gpus = True
        engine.sleep()
        engine._shares_gpus = False
        assert engine.pid is None
    else:
        with pytest.raises(EngineLostError, match="no sign of life"):
            engine.load_weights(buckets(), 0)
    assert time.monotonic() - start < 15
    assert works(engine, 1)
    assert engine.metrics()["engine/restarts"] == 1


def test_a_response_that_vllm_gives_up_is_sampled_again(make: Any) -> None:
    engine = make(PlayedHost(finish="abort"))
    engine.load_weights(buckets(), 1)
    with pytest.raises(EngineLostError, match=r"ended p\.jsonl:1 sample 0 with 'abort'") as lost:
        engine.generate(requests())
    assert lost.value.missing == [1, 2]
    assert works(engine, 1)


def test_no_memory_to_quantize_a_bucket_is_a_lost_engine_after_the_walk(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(PlayedHost())
    engine._config = replace(engine._config, quantization="fp8")

    def full(bucket: Bucket) -> Bucket:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module, "quantized", full)
    walk = buckets()
    with pytest.raises(EngineLostError, match="CUDA out of memory"):
        engine.load_weights(walk, 1)
    assert next(walk, None) is None, "to the end"


def test_cached_memory_is_given_back_before_an_engine_starts_or_wakes_on_the_same_gpu(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for the transport."""
    done: list[str] = []
    monkeypatch.setattr(engine_module, "give_back_cached_memory", lambda: done.append("room"))
    monkeypatch.setattr(engine_module, "visible_device", lambda device: "0")
    monkeypatch.setattr(
        engine_module,
        "Channel",
        lambda kind, *place, **options: Channel("gloo", *place, **options | {"device": CPU}),
    )
    host = PlayedHost(before=done.append)
    engine = make(host, device=GPU)
    assert done == ["room", "start", "sleep"]
    engine.load_weights(buckets(), 1)
    assert done[3:] == ["room", "join", "update"]
    host.players[-1].fence()
    with pytest.raises(EngineLostError):
        engine.generate(requests())
    done.clear()
    engine.load_weights(buckets(), 1)
    assert done == ["room", "start", "join", "update"]
    assert make(PlayedHost(before=done.append)) is not None
    assert done[4:] == ["start"], "beside a trainer on CPUs there is nothing to give back"


# ---- agents --------------------------------------------------------------------------------------


def test_an_agent_outlives_engines_that_die_or_cannot_be_started(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[Player] = []

    def start(job: Any, log: Path) -> Player:
        if len(processes) == 1:
            processes.append(processes[0])
            raise FileNotFoundError("no such python")
        processes.append(Player(job))
        return processes[-1]

    monkeypatch.setattr(host_module, "LocalProcess", start)
    agent = Agent("127.0.0.1", 0, tmp_path / "engines", "engine0")
    engine = make(placement="server")
    assert works(engine, 1)
    processes[0].fence()
    with pytest.raises(EngineLostError, match="exited with code 7"):
        engine.generate(requests())
    with pytest.raises(RuntimeError, match="cannot start it: no such python"):
        engine.load_weights(buckets(), 2)
    assert works(engine, 2)
    agent.close()


def test_the_file_of_a_dead_agent_is_recognised_and_a_new_agents_is_taken(tmp_path: Path) -> None:
    dead = Agent("127.0.0.1", 0, tmp_path, "engine0")
    left = dead.file.read_text()
    dead.close()
    dead.file.write_text(left)
    said = rf"process {os.getpid()} on 127\.0\.0\.1\) does not answer at port \d+ .*start it again"
    with pytest.raises(RuntimeError, match=said):
        AgentHost(dead.file, 0.1).listen_on()
    late: list[Agent] = []
    new = threading.Timer(0.3, lambda: late.append(Agent("127.0.0.1", 0, tmp_path, "engine0")))
    new.start()
    assert AgentHost(dead.file, 20).listen_on() == "127.0.0.1"
    late[0].close()


# ---- the process ---------------------------------------------------------------------------------


def test_an_engine_may_use_the_cpus_of_all_its_ranks(make: Any, tmp_path: Path) -> None:
    host = PlayedHost()
    make(host)
    mine = sorted(os.sched_getaffinity(0))
    assert host.players[0].job["cpus"] == mine
    program = "import os, time; time.sleep(0.2); print(os.sched_getaffinity(0))"
    job = {"incarnation": 1, "environment": {}, "cpus": mine[-1:]}
    process = LocalProcess(job, tmp_path / "log", (sys.executable, "-S", "-c", program))
    assert until(lambda: process.exit_code() is not None)
    assert f"{ {mine[-1]} }" in (tmp_path / "log").read_text()
    process.fence()
