"""Processes that have their imports behind them: forked in milliseconds from one that has them.

What a trainer imports takes four seconds of a core, and tests start over a hundred. They run what
`python -m megasd.cli` would run in a session of their own, with files for what they print. What is
about the start itself (launchers, signals before the first import) starts Python anew.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def context() -> ForkServerContext:
    """Of processes that are forked from the one server of this process, started when needed."""
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["megasd.testing.imported"])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return chosen


class Forked:
    """`function(*arguments)` in a process of its own, with the interface of a subprocess.

    Its exit code is the function's result or SystemExit's; its environment is this process's with
    `environment` on top, its working directory this one's or `directory`.
    """

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._output = tempfile.TemporaryDirectory()
        files = [str(Path(self._output.name) / name) for name in ("out", "errors")]
        chosen = context()
        began, beginning = chosen.Pipe(duplex=False)
        where = str(directory or Path.cwd())
        given = {**os.environ, **(environment or {})}
        self._process = chosen.Process(
            target=_run, args=(function, arguments, given, where, files, beginning)
        )
        self._process.start()
        beginning.close()
        began.poll(60)  # it leads its own session from here on
        began.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        folder = Path(self._output.name)
        return (folder / "out").read_text(), (folder / "errors").read_text()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run(
    function: Callable[..., int | None],
    arguments: Sequence[Any],
    environment: Mapping[str, str],
    directory: str,
    files: Sequence[str],
    beginning: Any,
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for stream, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    beginning.send(True)
    beginning.close()
    sys.exit(function(*arguments))


def complete(processes: Sequence[Forked]) -> subprocess.CompletedProcess[str]:
    """All of a run's ranks to their end; when one fails the others are killed, as launchers do."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        time.sleep(0.01)
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + 5.0:
            for process in processes:
                process.kill()
    printed = [process.communicate() for process in processes]
    code = next((process.returncode for process in processes if process.returncode), 0)
    out, errors = ("".join(part) for part in zip(*printed, strict=True))
    return subprocess.CompletedProcess("megasd", code, out, errors)


def start_ranks(function: Callable[..., int | None], *arguments: Any, ranks: int) -> list[Forked]:
    """`ranks` processes with the environment that torchrun gives its own; alone: none."""
    if ranks == 1:
        return [Forked(function, *arguments)]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    of_all["LOCAL_WORLD_SIZE"] = str(ranks)
    return [
        Forked(
            function, *arguments, environment={**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(ranks)
    ]
