"""Engine processes that are forked with vLLM imported, which alone takes eleven seconds of a core.

A nursery is a process whose fork server has vLLM imported. Engines and vLLM's own workers are
forked from it, each engine with its workers in a process group of its own. tests/end_to_end,
tests/slurm and the agent that is killed start theirs as users do.
"""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from megasd.rollout.vllm import link

ROOT = Path(__file__).parents[2]


class Nursery:
    """Open until `close`; `path` names it to other processes."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "nursery")
        base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rollout.nursery", self.path],
            stdin=subprocess.PIPE,  # it ends with it
            stdout=subprocess.PIPE,
            env=link.engine_environment(base, {}),
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"open\n"

    def close(self) -> None:
        self._process.communicate()


class Nursling:
    """A process of a nursery, with what is needed of the interface of a subprocess."""

    def __init__(
        self,
        nursery: str,
        function: Callable[..., None],
        arguments: Sequence[Any] = (),
        *,
        stdin: str = "",
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._nursery = nursery
        job = (function, tuple(arguments), stdin, str(log), dict(environment))
        self.pid = int(_ask(nursery, "start", job))

    def poll(self) -> int | None:
        return _ask(self._nursery, "poll", self.pid)

    def wait(self) -> int:
        return _ask(self._nursery, "wait", self.pid)


@contextlib.contextmanager
def forked_engines(nursery: str) -> Iterator[None]:
    """Within it this process's engines are forked from the nursery."""

    def start(job: Mapping[str, Any], log: Path, _: tuple[str, ...], stdin: str) -> Nursling:
        environment = link.engine_environment(os.environ, job["environment"])
        return Nursling(nursery, run_engine, stdin=stdin, log=log, environment=environment)

    real: Any = link.LocalProcess
    before, real._start = real._start, staticmethod(start)
    try:
        yield
    finally:
        real._start = staticmethod(before)


def run_engine() -> None:
    from vllm.v1.executor import multiproc_executor

    from megasd.rollout.vllm import process

    executor: Any = multiproc_executor
    executor.get_mp_context = Workers
    process.main()


def _ask(nursery: str, *request: Any) -> Any:
    with Client(nursery, family="AF_UNIX") as connection:
        connection.send(request)
        return connection.recv()


def _child(
    function: Callable[..., None],
    arguments: Sequence[Any],
    stdin: str,
    log: str,
    environment: Mapping[str, str],
) -> None:
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdin = io.StringIO(stdin)
    function(*arguments)


class Workers:
    """The context in which vLLM starts the workers of an engine: forked from the same server."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        server: Any = forkserver._forkserver
        server.ensure_running = lambda: None  # it would start another: this one is not its child

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def Process(self, *, target: Any, kwargs: Mapping[str, Any], **options: Any) -> Any:  # noqa: N802
        arguments = (os.getpgid(0), dict(os.environ), target, dict(kwargs))
        return self._context.Process(target=_worker, args=arguments, **options)


def _worker(group: int, environment: Mapping[str, str], target: Any, kwargs: Any) -> None:
    os.setpgid(0, group)
    os.environ.clear()
    os.environ.update(environment)
    target(**kwargs)


def _serve(path: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rollout.imported"])
    forkserver.ensure_running()
    processes = {}
    with Listener(path, family="AF_UNIX", backlog=16) as listener:
        print("open", flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        while True:
            with listener.accept() as connection:
                kind, about = connection.recv()
                if kind == "start":
                    process = context.Process(target=_child, args=about)
                    process.start()
                    processes[process.pid] = process
                    connection.send(process.pid)
                    continue
                if kind == "wait":
                    processes[about].join()
                connection.send(processes[about].exitcode)


if __name__ == "__main__":
    _serve(sys.argv[1])
