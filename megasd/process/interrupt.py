"""A stop that is asked for: SIGUSR1 and SIGTERM by a cluster, SIGINT and SIGHUP by a terminal.

While the loop trains, the ranks leave it together, save, and say how to go on. Before and after it
there is nothing to save, and a process ends at once; so it does when one but SIGUSR1 comes again.

The signals are blocked, and a thread waits for them, so that one is heard whatever the main thread
does. Slurm sends them to every process of a step and a terminal to every one of a group: blocked,
they stay blocked in the processes that a rank starts, which must not end before it has saved.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any, NoReturn

EXIT_CODE = 85  # what there is to save is saved and the run is not done: start it again
INTERRUPTED = 130  # the same, but a person stopped it: nobody is to start it again by himself
SAME_SIGNAL_SECONDS = 1.0  # a launcher may hand one signal on in two ways
_LOOK_SECONDS = 1.0
_KEY, _THREAD = "megasd/stop", "megasd-stop"
_SIGNALS = (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)  # the last one counts


class StopError(Exception):
    """Leaves the loop: raised on every rank, within a step that is given up or after one."""


class _State:
    """Of this process. The thread writes `asked`, the main thread the rest."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.is_in_loop = False
        self.remedy = "start it again"
        self.store: Any = None  # of torch.distributed: what the other ranks hear by
        self.next_look = 0.0
        self.insisted = math.inf  # when one but SIGUSR1 came first


_state = _State()


def listen() -> None:
    """Called before anything starts a thread: threads have the mask of the one that made them."""
    global _state
    _state = _State()
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    heard = {one for one in _SIGNALS if not _is_left_alone(one)}
    signal.pthread_sigmask(signal.SIG_BLOCK, heard - {signal.SIGTERM, signal.SIGINT})
    # To start this process of Python's later would unblock the other two (before Python 3.13).
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    for one in heard:
        # A job script ignores some until here, and ignored signals do not stay pending. This is
        # also for a library that unblocks one: better late than an end.
        signal.signal(one, lambda number, _: _take(signal.Signals(number)))
    threading.Thread(target=_hear, args=[heard], name=_THREAD, daemon=True).start()


def _is_left_alone(one: signal.Signals) -> bool:
    """A shell keeps Ctrl-C from what it started with `&`, and `nohup` the terminal's end."""
    return one in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(one) == signal.SIG_IGN


def share(store: Any) -> None:
    """That of the ranks, so that one that was not sent the signal hears of it within a second."""
    _state.store = store.clone()  # whoever waits in it holds the other


def after_this(remedy: str) -> None:
    """What a user can do once this process has ended at once."""
    _state.remedy = remedy


@contextlib.contextmanager
def heeded_by_the_loop() -> Iterator[None]:
    """Here a stop is `StopError`'s to bring, and to be answered by a save; after it, at once."""
    _state.is_in_loop = True
    try:
        yield
    except StopError:
        raise  # there is something to save now
    except BaseException:
        _state.is_in_loop = False
        raise
    if _state.asked is not None:  # too late for the loop to see
        _end(_state.asked, exit_code())
    _state.is_in_loop = False


def raise_if_asked() -> None:
    """For what may take long on this rank, whose caller raises the error on every other rank."""
    state = _state
    if state.asked is None and state.store is not None and time.monotonic() >= state.next_look:
        state.next_look = time.monotonic() + _LOOK_SECONDS
        if state.store.check([_KEY]):
            state.asked = signal.Signals(int(state.store.get(_KEY)))
    if state.asked is not None:
        raise StopError


def raise_if_asked_anywhere() -> None:
    """On every rank at once, whichever of them was sent a signal. A collective."""
    if asked_anywhere() is not None:
        raise StopError


def asked_anywhere() -> signal.Signals | None:
    """The same answer on every rank. A collective."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = 0 if _state.asked is None else 1 + _SIGNALS.index(_state.asked)
    asked = torch.tensor(mine, device=device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    if found := int(asked):
        _state.asked = _SIGNALS[found - 1]
    return _state.asked


def exit_code() -> int:
    """Of a run that was stopped."""
    return INTERRUPTED if _state.asked == signal.SIGINT else EXIT_CODE


def _hear(heard: set[signal.Signals]) -> None:
    while True:
        _take(signal.Signals(signal.sigwait(heard)))


def _take(came: signal.Signals) -> None:
    state, now = _state, time.monotonic()
    if not state.is_in_loop:
        state.asked = came
        _end(came, exit_code())
    if came != signal.SIGUSR1:  # that one is sent again and again
        if now - state.insisted > SAME_SIGNAL_SECONDS:
            _end(came, 128 + came)
        state.insisted = min(state.insisted, now)
    if state.asked is None:
        _say(f"{came.name}: the run saves and stops; SIGTERM or Ctrl-C again ends it at once")
    if state.asked is None or _SIGNALS.index(came) > _SIGNALS.index(state.asked):
        state.asked = came
        if state.store is not None:
            with contextlib.suppress(RuntimeError):  # the rank that keeps it is gone
                state.store.set(_KEY, str(int(came)))


def _end(came: signal.Signals, code: int) -> NoReturn:
    """At once, whatever the other threads do: what this process started ends with it."""
    if os.isatty(1):
        _write(1, "\x1b[?25h")  # a progress bar hides the cursor
    _say(f"ended by {came.name}: {_state.remedy}")
    os._exit(code)


def _say(sentence: str) -> None:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":  # one for all
        _write(2, f"\nmegasd: {sentence}\n")


def _write(handle: int, text: str) -> None:
    """Past Python's files: the main thread may hold their locks."""
    with contextlib.suppress(OSError):
        os.write(handle, text.encode())
