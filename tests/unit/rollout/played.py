"""Engines that are threads of the test: real connections and transfers, and they start at once."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from megasd.rollout.vllm.door import call, hang_up
from megasd.rollout.vllm.send import Feed, Receiver


class Player:
    """An engine process; it hangs for ever in what `hangs_in` names, though its heart beats."""

    pid = 4711

    def __init__(
        self,
        job: Mapping[str, Any],
        *,
        hangs_in: str = "",
        finish: str = "length",
        before: Callable[[str], None] = lambda kind: None,  # called before each command is obeyed
    ) -> None:
        self.job, self._hangs_in, self._finish, self._before = job, hangs_in, finish, before
        self._lock, self._over = threading.Lock(), threading.Event()
        for work in (self._play, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def _play(self) -> None:
        self._before("start")
        address = self.job["address"]
        self._connection = call(address, bytes.fromhex(self.job["key"]))
        self._send("ready", self.pid)
        with suppress(EOFError, RuntimeError, OSError):  # as a process that is killed
            while True:
                kind, content = self._connection.recv()
                self._before(kind)
                getattr(self, f"_on_{kind}")(content)

    def _beat(self) -> None:
        with suppress(OSError, AttributeError):
            while not self._over.wait(0.05):
                if hasattr(self, "_connection"):
                    self._send("beat", {"steps": 0})

    def _send(self, kind: str, content: Any = None) -> None:
        if kind == self._hangs_in:
            self._over.wait()
        with self._lock:
            self._connection.send((kind, content))

    def _on_join(self, feeds: Any) -> None:
        (feed,) = feeds
        self._receiver = Receiver(Feed(**feed), 0, torch.device("cpu"))
        self._send("joined")

    def _on_update(self, content: Any) -> None:
        for _ in self._receiver.buckets(content["number"]):
            pass
        self._version = content["version"]
        self._send("updated", self._version)

    def _on_sleep(self, _: None) -> None:
        self._send("asleep")

    def _on_abort(self, _: None) -> None: ...

    def _on_generate(self, requests: Any) -> None:
        for i, request in enumerate(requests):
            response = {
                "id": request["id"],
                "incarnation": self.job["incarnation"],
                "version": self._version,
                "token_ids": np.array([5, 6]),
                "logprobs": np.array([-1.0, -1.0], dtype=np.float32),
                "finish_reason": self._finish if i == 1 else "length",
                "peaks": {"waiting": 0.0, "cache": 0.0},
            }
            self._send("response", response)

    def exit_code(self) -> int | None:
        return 7 if self._over.is_set() else None

    def fence(self) -> None:
        self._over.set()
        with suppress(AttributeError):
            hang_up(self._connection)


class PlayedHost:
    """Starts a `Player` for each process; the first of them is made with `options`."""

    node = ""

    def __init__(self, **options: Any) -> None:
        self.players: list[Player] = []
        self._options = options

    def listen_on(self) -> None:
        return None

    def start(self, job: Mapping[str, Any]) -> None:
        before = {"before": self._options["before"]} if "before" in self._options else {}
        self.players.append(Player(job, **(before if self.players else self._options)))

    def death(self) -> str | None:
        return "it is over" if self.players[-1].exit_code() is not None else None

    def fence(self) -> None:
        if self.players:
            self.players[-1].fence()

    def close(self) -> None:
        self.fence()
