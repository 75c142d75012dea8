"""One spawned group of gloo ranks that many distributed test cases share.

A process start costs seconds (imports), a case milliseconds: so the processes live on, and every
case makes its own process group of the size it asks for.
"""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any


class RankError(AssertionError):
    """A rank raised, died or did not answer; the message names it and holds its traceback."""


def _serve(rank: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            case, args, world_size, rendezvous = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
            answer = (True, case(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        with contextlib.suppress(Exception):
            forget_model_parallel()
            dist.destroy_process_group()
        pipe.send(answer)


def forget_model_parallel() -> None:
    """Lets this process start another layout: Megatron keeps one in module variables."""
    import sys

    if state := sys.modules.get("megatron.core.parallel_state"):
        state.destroy_model_parallel()


class Ranks:
    """`run(case, *args, world_size=n)` runs `case(*args)` on ranks 0..n-1, returns their results.

    `case` is a module-level function; the default process group exists when it is called.
    After a failure the processes are replaced, so one broken case does not break the next.
    """

    def __init__(self, size: int = 4, timeout_seconds: float = 120.0) -> None:
        self.size = size
        self.timeout_seconds = timeout_seconds
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs))
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """Let the ranks end by themselves, with what they started; kill those that hang."""
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(5.0)
            process.kill()
            process.join()
        self._workers = []

    def run(self, case: Callable[..., Any], *args: Any, world_size: int) -> list[Any]:
        if not self._workers:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            workers = self._workers[:world_size]
            for _, pipe in workers:
                pipe.send((case, args, world_size, os.path.join(folder, "rendezvous")))
            results, failures = [], []
            for rank, (_, pipe) in enumerate(workers):
                try:
                    if not pipe.poll(5.0 if failures else self.timeout_seconds):
                        failures.append(f"rank {rank}: no answer")
                        continue
                    ok, result = pipe.recv()
                except EOFError:
                    ok, result = False, "the process died"
                if ok:
                    results.append(result)
                else:
                    failures.append(f"rank {rank}: {result}")
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return results
