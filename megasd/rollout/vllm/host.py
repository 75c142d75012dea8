"""The agent of an engine's node: starts and ends the engine process that a trainer asks for.

The job starts it on each engine node:

    python -m megasd.rollout.vllm.host --listen HOST:PORT --folder RUN/engines --name NAME

It writes its address and a secret into FOLDER/NAME.json, readable by its user only, and serves one
trainer and one engine at a time: a trainer that comes later takes over, and an engine ends with the
connection to its trainer, or with the agent. Strangers on its port, engines that die and engines
that cannot be started or ended change nothing for the agent.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from megasd.rollout.vllm.door import Door, hang_up
from megasd.rollout.vllm.link import LocalProcess, described_exit


class Agent:
    """`host`: the address of this machine as trainers reach it; `port` 0: any."""

    def __init__(self, host: str, port: int, folder: Path, name: str) -> None:
        self._log = folder / f"{name}.log"
        self._process: LocalProcess | None = None
        self._trainer: Connection | None = None
        self._lock = threading.Lock()  # one engine at a time
        key = os.urandom(32)
        self._door = Door(host, key, self._obey, port=port)
        self.file = folder / f"{name}.json"
        address: Any = self._door.address  # (host, port)
        secret = {"host": address[0], "port": address[1], "key": key.hex(), "pid": os.getpid()}
        _write_secret(self.file, secret)

    def _obey(self, trainer: Connection) -> None:
        with self._lock:
            before, self._trainer = self._trainer, trainer
            if before is not None:
                hang_up(before)
            self._answer("fence", None)
        with suppress(EOFError, OSError):
            while True:
                kind, content = trainer.recv()
                with self._lock:
                    if trainer is not self._trainer:
                        break
                    trainer.send(self._answer(kind, content))
        with self._lock:
            if trainer is self._trainer:
                self._answer("fence", None)
        trainer.close()

    def _answer(self, kind: str, content: Any) -> str | None:
        """None, or why there is no engine."""
        try:
            return self._done(kind, content)
        except Exception as error:  # the next one may do better
            print(f"megasd: warning: {kind}: {error!r}", file=sys.stderr, flush=True)
            return str(error) or repr(error)

    def _done(self, kind: str, content: Any) -> str | None:
        if kind == "start":
            self._end_engine()
            self._process = LocalProcess(content, self._log)
        elif kind == "fence":
            self._end_engine()
        elif kind == "health":
            code = None if self._process is None else self._process.exit_code()
            return None if code is None else described_exit(code)
        return None

    def _end_engine(self) -> None:
        if self._process is not None:
            self._process.fence()
        self._process = None

    def close(self) -> None:
        self._door.close()
        self._end_engine()
        self.file.unlink(missing_ok=True)


def _write_secret(file: Path, content: dict[str, Any]) -> None:
    """At once and for this user's eyes only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as out:
        json.dump(content, out)
    partial.replace(file)


def _own_name() -> str:
    """The address behind this machine's name."""
    return socket.gethostbyname(socket.gethostname())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listen", default=":0", metavar="HOST:PORT")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")
    agent = Agent(host or _own_name(), int(port), arguments.folder, arguments.name)

    def leave(signal_number: int, frame: FrameType | None) -> None:
        agent.close()
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    threading.Event().wait()  # for the end of the job


if __name__ == "__main__":
    main()
