"""What runs in a worker process: it starts fast (no torch) and dies with its parent."""

import contextlib
import ctypes
import math
import os
import signal
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megasd.rewards import verifiers

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Judged(NamedTuple):
    """What comes back to the Scorer: plain values, cheap to pickle."""

    reward: float
    feedback: str
    error: str | None


def start(parent: int, names: Iterable[str]) -> None:
    """Prepares the process: called once in each worker, before its first rollout.

    Slow imports happen here, so that no rollout's time limit pays for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A parent that is killed cannot clean up, and a hung verifier never sees its pipe close.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for name in names:
        # What cannot be imported raises again, and is reported, where a rollout needs it.
        with contextlib.suppress(Exception):
            warm_up(name)


def warm_up(name: str) -> None:
    """Imports what the verifier needs on its first call."""
    if name == "math":
        verifiers.math("1", "1", {})
    elif name == "code":
        verifiers.code("", None, {})
    elif name in verifiers.PACKAGES:
        __import__(verifiers.PACKAGES[name])
    else:
        verifiers.find_verifier(name)


def _place(error: BaseException, name: str) -> str:
    """Where in a user's own verifier: the innermost line of the module that holds it."""
    module = name.partition(":")[0]
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if ":" in name and frame.f_globals.get("__name__") == module
    ]
    return f" ({frames[-1][0].f_code.co_filename}:{frames[-1][1]})" if frames else ""


def judge(
    name: str, response: str, answer: str | None, metadata: Mapping[str, Any], pattern: str | None
) -> Judged:
    """`verifiers.verify`, with whatever it raises, or a reward that is no number, as an error."""
    try:
        reward, feedback = verifiers.verify(name, response, answer, metadata, pattern)
    except (Exception, SystemExit) as error:
        said = f"verifier {name} raised {type(error).__name__}: {error}"
        return Judged(0.0, "", said + _place(error, name))
    if not math.isfinite(reward):
        return Judged(0.0, "", f"verifier {name} returned the reward {reward}")
    return Judged(reward, feedback, None)
