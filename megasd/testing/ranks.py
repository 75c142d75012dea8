"""One spawned group of gloo ranks that many distributed test cases share.

A process start costs seconds (imports), a case milliseconds: so the processes live on, and every
case makes its own process group of the size it asks for.
"""

import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megasd.testing import forked

_EXITING = 0x4  # Linux' flag of a thread that others may have joined already


class RankError(AssertionError):
    """A rank raised, died or did not answer; the message names it and holds its traceback."""


def _serve(rank: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    # Their functions' defaults would be the group of the case that imports them first, for ever.
    import torch.distributed.fsdp
    import torch.distributed.nn

    torch.set_num_threads(1)
    while True:
        try:
            case, args, world_size, rendezvous = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        before = gloo_threads()
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
        gc.collect()
        gc.freeze()  # what is left stays, modules above all: the next case's collection is quick
        left = 0 if getattr(case, "keeps_groups", False) else gloo_threads() - before
        if left > 0 and answer[0]:
            answer = (False, f"the case left {left} threads of process groups behind")
        pipe.send((*answer, left <= 0))


def gloo_threads() -> int:
    """How many threads the process groups of this process have: none, when all have ended."""
    found = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended since
            name, _, fields = (thread / "stat").read_text().rpartition(")")
            is_ending = int(fields.split()[6]) & _EXITING
            found += "gloo" in name and not is_ending
    return found


def forget_model_parallel() -> None:
    """Lets this process start another layout, and the groups of this one end.

    Megatron keeps them in module variables, in the caches of its rotary embeddings, and in its
    wrapped models, which are never freed: a hook of each parameter's gradient node refers to the
    model, the optimizer's view of the parameter to the node, and Python's collector sees no
    further than the view.
    """
    if state := sys.modules.get("megatron.core.parallel_state"):
        state.destroy_model_parallel()
        vars(state)["_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"] = None  # it forgets this one
    if rope := sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding"):
        rope.RotaryEmbedding.forward.cache_clear()
    if data_parallel := sys.modules.get("megatron.core.distributed"):
        wrapper = data_parallel.DistributedDataParallel
        for model in [found for found in gc.get_objects() if type(found) is wrapper]:
            vars(model).clear()


class Ranks:
    """`run(case, *args, world_size=n)` runs `case(*args)` on ranks 0..n-1, returns their results.

    `case` is a module-level function; the default process group exists when it is called.
    Its process groups must end with it: what it leaves behind would slow the next, and hide leaks
    (but for one with the attribute `keeps_groups`).
    Processes that did not answer, or were left with groups, are replaced before the next case.
    `has_imports`: they are forked with a trainer's imports behind them (forked.py).
    """

    def __init__(
        self, size: int = 4, timeout_seconds: float = 120.0, *, has_imports: bool = True
    ) -> None:
        self.size = size
        self.timeout_seconds = timeout_seconds
        self.has_imports = has_imports
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        spawning = multiprocessing.get_context("spawn")
        chosen = forked.context() if self.has_imports else spawning
        for rank in range(self.size):
            ours, theirs = chosen.Pipe()
            process = chosen.Process(target=_serve, args=(rank, theirs))
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
            results, failures, fit = [], [], True
            for rank, (_, pipe) in enumerate(workers):
                try:
                    if pipe.poll(5.0 if failures else self.timeout_seconds):
                        ok, result, as_before = pipe.recv()
                    else:
                        ok, result, as_before = False, "no answer", False
                except EOFError:
                    ok, result, as_before = False, "the process died", False
                fit = fit and as_before
                if ok:
                    results.append(result)
                else:
                    failures.append(f"rank {rank}: {result}")
        if not fit:
            self.close()
        if failures:
            raise RankError("\n".join(failures))
        return results
