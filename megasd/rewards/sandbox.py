"""Runs untrusted Python in a process of its own that can reach nothing but its own pipes.

What contains it is in megasd.rewards.jail. The parent, here, trusts nothing that comes back: it
reads at most so many bytes, waits at most so long, then kills the process group. Linux only.
"""

import fcntl
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from megasd.rewards.jail.main import lacking

# -I -S: no environment, no working directory, no site-packages; the standard library only.
BOOTSTRAP = (
    "import sys; sys.path.append(sys.argv[1]); from jail.main import main; sys.path.pop(); main()"
)
# Some interpreters find their own library with it. The program does not see it.
ENVIRONMENT = ("LD_LIBRARY_PATH",)
START_SECONDS = 10.0  # until the program runs; not of its own time

MEGABYTE = 1 << 20


class SandboxError(RuntimeError):
    """This machine cannot contain a program, so none was run."""


@dataclass(frozen=True)
class Limits:
    """Of one run."""

    seconds: float = 5.0  # by the clock; of processor time one more
    memory_bytes: int = 512 * MEGABYTE  # address space
    output_bytes: int = MEGABYTE  # of stdout, of stderr and of the result, each
    file_bytes: int = 16 * MEGABYTE  # all files together


@dataclass(frozen=True)
class Ended:
    """How a program ended and what it wrote. All of it is the program's word, not ours."""

    stdout: str
    stderr: str
    result: str  # JSON of [value, its repr]; "" without an expression, or where it raised
    exit_code: int  # 128 + n: ended by signal n, as shells count
    stopped: Literal["", "time", "output"]  # why we killed it, if we did
    layers: tuple[str, ...]  # of the sandbox
    missing: dict[str, str]  # layers that this machine has not, and why


def run(
    program: str,
    *,
    stdin: str = "",
    expression: str | None = None,
    args: list[Any] | None = None,
    limits: Limits | None = None,
    without: tuple[str, ...] = (),
) -> Ended:
    """Runs `program`; then evaluates `expression` in it, called with `args` unless that is None.

    Without an expression the program is a script (`__name__ == "__main__"`). `without` leaves out
    layers, as a machine would that lacks them (tests). Raises SandboxError where the layers that
    are left do not contain a program.
    """
    limits = limits or Limits()
    request = {
        "program": program,
        "expression": expression,
        "args": args,
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "without": without,
        "serial": time.monotonic_ns() // 1000,
    }
    with _memory_file(json.dumps(request)) as ask, _memory_file(stdin) as given:
        pipes = [os.pipe() for _ in range(2)]
        try:
            writers = [writer for _, writer in pipes]
            process = _start(ask.fileno(), given.fileno(), writers)
        except BaseException:
            for reader, _ in pipes:
                os.close(reader)
            raise
        finally:
            for _, writer in pipes:
                os.close(writer)
    status, result = (os.fdopen(reader, "rb") for reader, _ in pipes)
    assert process.stdout is not None
    assert process.stderr is not None
    with status, result, process.stdout as stdout, process.stderr as stderr:
        written, stopped = _read_until_gone(process, [status, result, stdout, stderr], limits)
    state, value, out, err = (bytes(part).decode(errors="replace") for part in written)
    if not state:
        detail = f"took longer than {START_SECONDS:g} s" if stopped else f"failed: {err.strip()}"
        raise SandboxError(f"the start of the sandbox {detail}")
    layers = json.loads(state)
    if reason := lacking(layers["present"]):
        faults = ", ".join(f"{name}: {fault}" for name, fault in layers["missing"].items())
        raise SandboxError(f"this machine cannot contain a program: no {reason} ({faults})")
    return Ended(
        out, err, value, process.returncode, stopped, tuple(layers["present"]), layers["missing"]
    )


@functools.cache
def check() -> str | None:
    """Why no program can be run here; None where it can. Warns about layers that are missing."""
    try:
        ended = run("")
    except (SandboxError, OSError) as error:
        return str(error)
    if ended.exit_code != 0:
        return f"an empty program fails in the sandbox: {ended.stderr.strip() or ended.stopped}"
    if ended.missing:
        lines = ", ".join(f"{name} ({reason})" for name, reason in ended.missing.items())
        warnings.warn(
            f"the sandbox of verifier code lacks: {lines}. Programs are still contained by: "
            f"{', '.join(ended.layers)}.",
            stacklevel=2,
        )
    return None


def _memory_file(text: str) -> BinaryIO:
    """A file that has no name and that nobody can change: nothing to clean up, nothing to write."""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    handle: BinaryIO = os.fdopen(file, "w+b")
    handle.write(text.encode(errors="replace"))
    handle.seek(0)  # and flush, before the seals
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return handle


def _start(request: int, stdin: int, writers: list[int]) -> "subprocess.Popen[bytes]":
    here = str(Path(__file__).parent)
    words = [str(word) for word in (here, request, *writers, os.getpid())]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", "-c", BOOTSTRAP, *words],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(request, *writers),
        env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        cwd="/",
        start_new_session=True,
    )


def _read_until_gone(
    process: "subprocess.Popen[bytes]", files: list[IO[bytes]], limits: Limits
) -> tuple[list[bytearray], Literal["", "time", "output"]]:
    """What each file gave until all writers were gone, or until we stopped them, and why.

    The first file ends when the program starts; its time begins then. The supervisor and init hold
    stdout and stderr open: these end when the last process does.
    """
    written = [bytearray() for _ in files]
    deadline = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        for file, buffer in zip(files, written, strict=True):
            selector.register(file.fileno(), selectors.EVENT_READ, buffer)
        try:
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return written, "time"
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 1 << 16)
                    key.data.extend(chunk)
                    if not chunk:
                        selector.unregister(key.fd)
                        if key.fd == files[0].fileno():
                            deadline = time.monotonic() + limits.seconds
                    elif len(key.data) > limits.output_bytes:
                        return written, "output"
            return written, ""
        finally:
            # Not yet waited for, so the group's number is still its own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
