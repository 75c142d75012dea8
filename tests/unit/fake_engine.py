"""An engine process without vLLM: real connection, real transfer, made-up responses."""

import json
import os
import signal
import sys
import time
from typing import Any

import numpy as np
import torch

from megasd.rollout.vllm.process import Wire
from megasd.rollout.vllm.send import Feed, Receiver


def main() -> None:
    job = json.loads(sys.stdin.read())
    behaviour = job["options"].get("behaviour", "")
    if behaviour == "does not start":
        print("vllm is not in the mood")
        sys.exit(3)
    wire = Wire(job)
    wire.send("ready", os.getpid())
    receiver, version = None, None
    while True:
        kind, content = wire.commands.get()
        if kind == "join":
            (feed,) = content
            receiver = Receiver(Feed(**feed), 0, torch.device("cpu"))
            wire.send("joined")
        elif kind == "update":
            assert receiver is not None
            try:
                for _ in receiver.buckets(content["number"]):
                    pass
            except RuntimeError as error:
                wire.send("failed", str(error))
                return
            version = content["version"]
            wire.send("updated", version)
        elif kind == "generate":
            answer_all(wire, job, content, version, behaviour)


def answer_all(
    wire: Wire, job: dict[str, Any], requests: list[dict[str, Any]], version: Any, behaviour: str
) -> None:
    for i, request in enumerate(requests):
        token_ids = np.array(request["token_ids"][:2], dtype=np.int64)
        response = {
            "id": request["id"],
            "incarnation": job["incarnation"],
            "version": version,
            "token_ids": token_ids,
            "logprobs": np.full(len(token_ids), -1.5, dtype=np.float32),
            "finish_reason": "length",
            "peaks": {"waiting": 4.0, "cache": 0.5},
        }
        if behaviour == "answers for others too":
            wrong = np.array([7, 7, 7], dtype=np.int64)
            wire.send("response", response | {"version": version - 1, "token_ids": wrong})
            wire.send("response", response | {"incarnation": 0, "token_ids": wrong})
            wire.send("response", response | {"id": "nobody's", "token_ids": wrong})
        if behaviour == "not a number" and i == 1:
            response["logprobs"] = np.full(len(token_ids), np.nan, dtype=np.float32)
        if i == 1 and behaviour == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if i == 1 and behaviour == "works for ever":
            time.sleep(600)  # its heart goes on
        wire.send("response", response)


if __name__ == "__main__":
    main()
