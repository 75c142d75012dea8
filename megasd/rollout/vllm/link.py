"""How a trainer and an engine process find, talk to and end each other. Standard library only.

The engine process dials the trainer, wherever it runs, and both send (kind, content) messages.
A link belongs to one incarnation of one engine: a process that was started once and is never
trusted again after its connection closed.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil

from megasd.rollout.vllm.door import GREETING_SECONDS, Door, call, hang_up

Message = tuple[str, Any]
COMMAND = (sys.executable, "-m", "megasd.rollout.vllm.process")
ANSWER_SECONDS = 60.0
CLOSED = "its connection closed"
LOG_LINES = 15  # of an engine's log in an error
LONGEST_TMPDIR = 60  # characters: vLLM puts sockets there, whose names may have 107
# They would make vLLM believe that it is a rank of the trainer ...
LEAKING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
LEAKING += ("ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_", "PMI", "OMPI_")
# ... or forbid its sleep mode, which does not go with expandable segments.
LEAKING += ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
LEAKING += ("CUDA_DEVICE_MAX_CONNECTIONS",)  # one queue is for Megatron's tensor parallelism
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the loop over its steps is ours
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # the process has threads
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
}


def engine_environment(base: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """What an engine process inherits: nothing that names a rank of the trainer."""
    kept = {name: value for name, value in base.items() if not name.startswith(LEAKING)}
    if len(tempfile.gettempdir()) > LONGEST_TMPDIR:
        kept["VLLM_RPC_BASE_PATH"] = "/tmp"
    return kept | ENVIRONMENT | dict(extra)


class LocalProcess:
    """A process in a session of its own, so that all it starts ends with it."""

    def __init__(
        self, job: Mapping[str, Any], log: Path, command: tuple[str, ...] = COMMAND
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            out.write(f"--- incarnation {job['incarnation']}\n")
        self._process = self._start(job, log, command, json.dumps(dict(job)))
        self.pid = self._process.pid
        self._fenced = False

    @staticmethod
    def _start(
        job: Mapping[str, Any], log: Path, command: tuple[str, ...], stdin: str
    ) -> "subprocess.Popen[bytes]":
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=engine_environment(os.environ, job["environment"]),
                start_new_session=True,
            )
        if cpus := job.get("cpus"):  # before it starts threads
            with suppress(OSError):  # some of them are not this job's
                os.sched_setaffinity(process.pid, cpus)
        assert process.stdin is not None
        # By stdin: the key must not show in a list of processes.
        with suppress(BrokenPipeError):
            process.stdin.write(stdin.encode())
            process.stdin.close()
        return process

    def exit_code(self) -> int | None:
        return self._process.poll()

    def fence(self, timeout_seconds: float = 30.0) -> None:
        """Returns when no process of the session's group is left."""
        if self._fenced:
            return
        end = time.monotonic() + timeout_seconds
        while _alive(self.pid):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.poll()
            if time.monotonic() > end:
                raise RuntimeError(
                    f"process group {self.pid} does not end after SIGKILL: its device hangs; "
                    "take the node out of service"
                )
            time.sleep(0.02)
        self._process.wait()  # no zombie is left either
        self._fenced = True


def _alive(group: int) -> bool:
    """Whether a process of the group runs. Zombies do not: nobody may be there to reap them."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


class Link:
    """The trainer's end of the connection. A thread reads it; `inbox` holds what is not a beat."""

    def __init__(self, incarnation: int, host: str | None) -> None:
        """Listens on `host`, or for this machine only when it is None."""
        self.incarnation = incarnation
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.beat: dict[str, Any] = {}  # the last one
        self.last_sign = self.last_step = time.monotonic()
        self.pid: int | None = None  # of the engine process, once it is ready
        self.lost: str | None = None  # why nothing more will come
        self.on_lost: Callable[[str], None] | None = None
        self._key = os.urandom(32)
        self._connection: Connection | None = None
        self._first = threading.Lock()  # taken once, by the process that called
        self._door = Door(host, self._key, self._take)
        self._address = self._door.address

    def address(self) -> dict[str, Any]:
        """For the engine process; plain values."""
        incarnation = self.incarnation
        return {"address": self._address, "key": self._key.hex(), "incarnation": incarnation}

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def send(self, kind: str, content: Any = None) -> None:
        """A process that is gone is not an error here: `lost` says so."""
        try:
            if self._connection is None:
                raise OSError("the process has not called yet")
            self._connection.send((kind, content))
        except OSError as error:
            self._lose(f"it cannot be reached: {error}")

    def _take(self, connection: Connection) -> None:
        if self.lost is not None or not self._first.acquire(blocking=False):
            return connection.close()
        self.last_sign = time.monotonic()
        self._connection = connection
        self._door.close()
        try:
            while True:
                kind, content = connection.recv()
                self.last_sign = time.monotonic()
                if kind == "beat":
                    self._take_beat(content)
                elif kind == "failed":
                    self._lose(content)
                else:
                    self.last_step = self.last_sign
                    self.inbox.put((kind, content))
        except (EOFError, OSError):
            self._lose(CLOSED)
            connection.close()

    def _take_beat(self, beat: dict[str, Any]) -> None:
        if beat["steps"] != self.beat.get("steps"):
            self.last_step = self.last_sign
        self.beat = beat

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            if self.on_lost is not None:
                self.on_lost(reason)

    def close(self) -> None:
        self._lose("it was closed")
        self._door.close()
        if self._connection is not None:
            hang_up(self._connection)


class Host(Protocol):
    """Where an engine's processes run, one at a time."""

    node: str  # as this machine reaches it; "": it is this machine

    def listen_on(self) -> str | None:
        """This side's address for the link; None: this machine only."""
        ...

    def start(self, job: Mapping[str, Any]) -> None:
        """Ends the process before, if there is one."""
        ...

    def death(self) -> str | None:
        """Why there is no process, in words; None while it runs."""
        ...

    def fence(self) -> None: ...

    def close(self) -> None: ...


class LocalHost:
    node = ""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: LocalProcess | None = None

    def listen_on(self) -> str | None:
        return None

    def start(self, job: Mapping[str, Any]) -> None:
        self.fence()
        self._process = LocalProcess(job, self._log, COMMAND)

    def death(self) -> str | None:
        code = None if self._process is None else self._process.exit_code()
        return None if code is None else described_exit(code)

    def fence(self) -> None:
        if self._process is not None:
            self._process.fence()
        self._process = None

    def close(self) -> None:
        self.fence()


class AgentHost:
    """An agent (rollout/vllm/host.py) on another node, found by the file it wrote.

    One rank speaks with it, the engine's owner: an agent serves the trainer that called last.
    """

    def __init__(self, file: Path, timeout_seconds: float) -> None:
        self._file, self._timeout = file, timeout_seconds
        self._agent: Connection | None = None
        self.node = ""  # of the agent that is connected
        self._death: str | None = None

    def listen_on(self) -> str | None:
        self._agent = self._agent or self._connect()
        return own_address(self.node)

    def start(self, job: Mapping[str, Any]) -> None:
        self._death = None
        if trouble := self._ask("start", dict(job)):
            raise RuntimeError(f"the agent that wrote {self._file} cannot start it: {trouble}")

    def death(self) -> str | None:
        return self._ask("health")

    def fence(self) -> None:
        self._ask("fence")

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()  # the agent ends the engine
        self._agent = None

    def found(self) -> dict[str, Any]:
        """The address that the agent wrote."""
        end = time.monotonic() + self._timeout
        while True:
            with suppress(FileNotFoundError):
                return json.loads(self._file.read_text())
            if time.monotonic() > end:
                raise RuntimeError(
                    f"no agent wrote {self._file} in {self._timeout:.0f} s: start "
                    f"`python -m megasd.rollout.vllm.host --folder {self._file.parent} "
                    f"--name {self._file.stem}` on the engine's node"
                )
            time.sleep(0.1)

    def _connect(self) -> Connection:
        """To the agent that is there; one that was started again wrote another address.

        A file may outlive its agent, and another service have its port meanwhile.
        """
        end = time.monotonic() + self._timeout
        while True:
            agent = self.found()
            self.node = agent["host"]
            try:
                return call(
                    (self.node, agent["port"]),
                    bytes.fromhex(agent["key"]),
                    min(GREETING_SECONDS, self._timeout),
                )
            except OSError as error:
                if time.monotonic() > end:
                    raise RuntimeError(
                        f"the agent that wrote {self._file} (process {agent['pid']} on "
                        f"{self.node}) does not answer at port {agent['port']} ({error}): "
                        "start it again"
                    ) from error
                time.sleep(0.2)

    def _ask(self, kind: str, content: Any = None) -> str | None:
        """Why there is no engine, or None. Starting one connects; without that there is none."""
        if self._agent is None:
            if kind != "start":
                return self._death
            self._agent = self._connect()
        try:
            self._agent.send((kind, content))
            if not self._agent.poll(ANSWER_SECONDS):
                raise OSError(f"no answer in {ANSWER_SECONDS:.0f} s")
            return self._agent.recv()
        except (OSError, EOFError) as error:
            self._agent.close()  # an agent ends the engine of a trainer that left
            self._agent = None
            self._death = f"the agent that wrote {self._file} is gone ({error!r})"
            if kind == "start":
                raise RuntimeError(self._death) from error
            return self._death


def own_address(peer: str) -> str:
    """The address of this machine on the way to `peer`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing
        return probe.getsockname()[0]


def described_exit(code: int) -> str:
    if code >= 0:
        return f"its process exited with code {code}"
    names = {one.value: one.name for one in signal.Signals}
    return f"its process was killed by {names.get(-code, f'signal {-code}')}"


def last_lines(log: Path) -> str:
    """The end of an engine's log, for an error."""
    if not log.is_file():
        return f"{log} does not exist"
    lines = log.read_text(errors="replace").splitlines()
    lines = lines[
        max((i for i, line in enumerate(lines) if line.startswith("--- inc")), default=0) :
    ]
    return "\n".join([f"{log} ends with:", *(f"  {line}" for line in lines[-LOG_LINES:])])
