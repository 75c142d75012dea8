"""The engine process: real vLLM behind a connection. Beside receive.py nobody imports vllm.

`python -m megasd.rollout.vllm.process` reads its job as JSON from stdin and dials the trainer
before it imports vllm: the trainer hears its heartbeat from then on. The main thread alone touches
vLLM; one thread reads commands, one sends a beat each second. The process ends with its connection.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np

from megasd.process import startup

BEAT_SECONDS = 1.0


class Wire:
    """The connection to the trainer; any thread may send."""

    def __init__(self, job: dict[str, Any]) -> None:
        address = job["address"]
        self._connection: Connection = Client(
            tuple(address) if isinstance(address, list) else address,
            authkey=bytes.fromhex(job["key"]),
        )
        self._lock = threading.Lock()
        self.commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.state: dict[str, Any] = {"steps": 0, "running": 0, "waiting": 0, "cache": 0.0}
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, kind: str, content: Any = None) -> None:
        with self._lock:
            self._connection.send((kind, content))

    def _read(self) -> None:
        try:
            while True:
                self.commands.put(self._connection.recv())
        except (EOFError, OSError):
            end()

    def _beat(self) -> None:
        starter = os.getppid()
        try:
            while os.getppid() == starter:
                self.send("beat", dict(self.state))
                time.sleep(BEAT_SECONDS)
        finally:
            end()


def end() -> None:
    """Ends the process and the workers it started, whatever they are doing."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class Engine:
    """One vLLM engine and what the trainer may ask of it."""

    def __init__(self, wire: Wire, job: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from megasd.rollout.vllm.receive import BACKEND

        self._wire = wire
        self._incarnation = job["incarnation"]
        self._version: int | None = None
        self._asleep = False
        self._vllm: Any = LLM(
            **job["options"],
            worker_extension_cls="megasd.rollout.vllm.receive.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        )
        self._scheduler = self._vllm.llm_engine.engine_core.engine_core.scheduler
        self._going: set[str] = set()  # ids of unfinished requests
        self._peaks = {"waiting": 0.0, "cache": 0.0}  # since requests last came

    def serve(self) -> None:
        while True:
            command = self._command(wait=not self._going)
            if command is not None:
                kind, content = command
                getattr(self, f"on_{kind}")(content)
                continue
            outputs = self._vllm.llm_engine.step()
            self._note_state()
            for output in outputs:
                if output.finished:
                    self._answer(output)

    def _command(self, wait: bool) -> tuple[str, Any] | None:
        try:
            return self._wire.commands.get(block=wait)
        except queue.Empty:
            return None

    def _note_state(self) -> None:
        running, waiting = self._scheduler.get_request_counts()
        now = {"waiting": float(waiting), "cache": self._scheduler.kv_cache_manager.usage}
        self._wire.state = {"steps": self._wire.state["steps"] + 1, "running": running, **now}
        self._peaks = {name: max(now[name], self._peaks[name]) for name in now}

    def _advance(self) -> None:
        """Tells the trainer that something was done: it replaces an engine that hangs."""
        self._wire.state = self._wire.state | {"steps": self._wire.state["steps"] + 1}

    def on_join(self, feeds: list[dict[str, Any]]) -> None:
        self._vllm.init_weight_transfer_engine({"init_info": {"feeds": feeds}})
        self._wire.send("joined")

    def on_update(self, content: dict[str, int]) -> None:
        """Weights are complete and of one version when it returns; otherwise the process ends."""
        self.on_abort()
        self._version = None
        if self._asleep:
            self._vllm.wake_up(["weights"])
        self._advance()
        self._vllm.start_weight_update()
        self._vllm.update_weights({"update_info": {"number": content["number"]}})
        self._advance()
        self._vllm.finish_weight_update()
        self._advance()
        if self._asleep:
            self._vllm.wake_up(["kv_cache"])
            self._asleep = False
        # Else prompts longer than a block would be continued from the keys of older weights.
        if not self._vllm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied after the update")
        self._version = content["version"]
        self._wire.send("updated", self._version)

    def on_sleep(self, _: None) -> None:
        self.on_abort()
        self._version = None
        self._vllm.sleep(level=2)
        self._asleep = True
        self._wire.send("asleep")

    def on_abort(self, _: None = None) -> None:
        self._vllm.llm_engine.abort_request(list(self._going))
        self._going.clear()

    def on_generate(self, requests: list[dict[str, Any]]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._peaks = dict.fromkeys(self._peaks, 0.0)
        for request in requests:
            try:
                sampling = SamplingParams(
                    **request["sampling"],
                    ignore_eos=True,  # the ids that end a response come with the request
                    detokenize=bool(request["sampling"].get("stop")),
                    flat_logprobs=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                self._vllm.llm_engine.add_request(
                    request["id"], {"prompt_token_ids": request["token_ids"]}, sampling
                )
            except Exception as error:  # too long, for example; its class differs by version
                self._wire.send("refused", {"id": request["id"], "error": str(error)})
            else:
                self._going.add(request["id"])

    def _answer(self, output: Any) -> None:
        self._going.discard(output.request_id)
        result = output.outputs[0]
        scores = output.prompt_logprobs if output.prompt_logprobs is not None else result.logprobs
        self._wire.send(
            "response",
            {
                "id": output.request_id,
                "incarnation": self._incarnation,
                "version": self._version,
                "token_ids": np.asarray(result.token_ids, dtype=np.int32),
                # One id per position: none at a prompt's first token, which has no log-prob.
                "logprobs": np.asarray(scores.logprobs, dtype=np.float32),
                "finish_reason": result.finish_reason,
                "peaks": self._peaks,
            },
        )


def main() -> None:
    job = json.loads(sys.stdin.read())
    wire = Wire(job)
    startup.begin()
    try:
        from megasd.rollout.vllm.versions import probe  # imports torch: after the first beat

        probe()
        engine = Engine(wire, job)
        startup.end()
        wire.send("ready", os.getpid())
        engine.serve()
    except BaseException as error:
        # The trainer discards a process that failed, so it ends here and takes its workers along.
        traceback.print_exc()
        sys.stderr.flush()
        wire.send("failed", f"{type(error).__name__}: {error}")
        time.sleep(0.2)  # the message leaves before the process does
        end()


if __name__ == "__main__":
    main()
