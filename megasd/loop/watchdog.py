"""Ends a run in which nothing happens any more, and says which rank is waited for.

A thread of each rank looks at that rank's progress. Where no step ends in time, it writes what the
rank is doing, with the stacks of all threads, into RUN/hangs/TIME/; the folder makes the threads
of the other ranks do the same. The first rank that could write compares, and names in summary.txt
the rank, or the sample, that the others wait for. Then all end with exit code 86, and whatever
started them starts them again. Only files: collectives and sockets may be what hangs. Where files
hang too, the stacks go to stderr, and the ranks end all the same.
"""

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

import megasd
from megasd.configuration.load import WatchdogConfig
from megasd.metrics.phases import Phases
from megasd.process import together, waiting

EXIT_CODE = 86
SUMMARY_FILE = "summary.txt"
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
_OUR_FILES = os.path.dirname(megasd.__file__) + os.sep


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is, as far as another one can compare it."""

    host: str
    phase: str
    begun: int  # phases so far: the same number on ranks that are equally far
    line: str  # of megasd: "policy/update.py:201 in update"
    collective: str  # that the main thread is in; empty: in none
    waits_for: str  # samples and the like, in words


def limit_seconds(config: WatchdogConfig, phases: Phases) -> float:
    """How long it may take from one sign of progress to the next, in the present phase.

    What has no usual time has `slow_seconds`: the start, the first step, the first evaluation,
    and waits that say so, as for the files of a checkpoint.
    """
    usual = phases.evaluation_seconds if phases.current == "evaluation" else phases.step_seconds
    if waiting.may_take_long() or not usual:
        return max(config.slow_seconds, config.minimum_seconds)
    return max(config.minimum_seconds, config.factor * statistics.median(tuple(usual)))


class IdleTime:
    """Seconds without progress, as far as this process could have made any.

    One that is stopped for a while, or whose machine is, counts `longest_look` of it at most.
    """

    def __init__(self, phases: Phases, longest_look: float) -> None:
        self._phases, self._longest_look = phases, longest_look
        self._progress = self._looked = phases.progress
        self._seconds = 0.0

    def look(self) -> float:
        """Called again and again, at intervals shorter than `longest_look`."""
        now, progress = self._phases.clock(), self._phases.progress
        passed = min(now - self._looked, self._longest_look)
        if progress == self._progress:
            self._seconds += passed
        else:
            self._seconds = min(now - progress, passed)
        self._progress, self._looked = progress, now
        return self._seconds


def explain(places: Mapping[int, Place], hosts: list[str]) -> str:
    """Who is waited for, from what the ranks that answered have written; `hosts` of all ranks."""
    phase = Counter(place.phase for place in places.values()).most_common(1)[0][0]
    silent = [rank for rank in range(len(hosts)) if rank not in places]
    if silent:
        who = ", ".join(f"rank {rank} (node {hosts[rank]})" for rank in silent)
        verb = "does" if len(silent) == 1 else "do"
        return f"phase {phase}: {who} {verb} not answer: stopped, dead, or stuck in native code"
    late = _late(places)
    if not late:
        place = places[min(places)]
        inside = f" in {place.collective}" if place.collective else ""
        return f"phase {phase}: every rank is at {place.line}{inside}; nobody is behind"
    doing = "; ".join(
        f"rank {rank} (node {place.host}) is in phase {place.phase} at {place.line}"
        + (f", and waits for {place.waits_for}" if place.waits_for else "")
        for rank, place in sorted(late.items())
    )
    return f"phase {phase}: {doing}" + ("; the others wait" if len(late) < len(places) else "")


def _late(places: Mapping[int, Place]) -> dict[int, Place]:
    """Those that others wait for, by the first of these signs that tells ranks apart."""
    furthest = max(place.begun for place in places.values())
    usual, _ = Counter(place.line for place in places.values()).most_common(1)[0]
    is_in_collective = any(place.collective for place in places.values())
    for late in (
        {rank: place for rank, place in places.items() if place.begun < furthest},
        {
            rank: place
            for rank, place in places.items()
            if is_in_collective and not place.collective
        },
        {rank: place for rank, place in places.items() if place.waits_for},
        # On a GPU nobody waits inside of a collective, but for its result.
        {rank: place for rank, place in places.items() if place.line != usual},
    ):
        if late:
            return late
    return {}


class Watchdog:
    """A context manager around all that should make progress; entered by all ranks together."""

    def __init__(self, config: WatchdogConfig, run_folder: Path, phases: Phases) -> None:
        self._config, self._phases = config, phases
        self._rank = dist.get_rank()
        self._main = threading.get_ident()
        own = (socket.gethostname(), time.strftime("%Y%m%d-%H%M%S"))
        everyone = together.from_every_rank(own)
        self._hosts = [host for host, _ in everyone]
        self._folder = run_folder / "hangs" / everyone[0][1]
        # Looked at often enough that the first report of a hang finds the others within seconds.
        self._tick = min(max(config.minimum_seconds / 30, 0.2), 10.0)
        self._is_over = threading.Event()
        self._others_end = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._config.factor > 0:
            for watch in (self._watch_others, self._watch_own):
                threading.Thread(target=watch, name="megasd-watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()

    def _watch_others(self) -> None:
        """In a thread of its own, which a file system that hangs may keep for ever."""
        while not self._is_over.wait(self._tick):
            with contextlib.suppress(OSError):  # it may pass
                if self._folder.exists():
                    return self._others_end.set()

    def _watch_own(self) -> None:
        idle = IdleTime(self._phases, longest_look=3 * self._tick)
        while not self._is_over.is_set():
            others_end = self._others_end.wait(self._tick)
            seconds, limit = idle.look(), limit_seconds(self._config, self._phases)
            if (seconds > limit or others_end) and not self._is_over.is_set():
                self._end(f"no step for {seconds:.0f} s, the limit is {limit:.0f} s")

    def _end(self, why: str) -> None:
        """Does not return."""
        try:
            self._insist(why)
            self._write_report()
            time.sleep(3 * self._tick + 2)  # for the others to see the folder and answer
            places = self._read_reports()
            summary = self._folder / SUMMARY_FILE
            if self._rank == min(places):
                found = (
                    f"{why}; {explain(places, self._hosts)}\nstacks of all ranks: {self._folder}\n"
                )
                _write(summary, found)
                print(f"megasd: error: {found}", end="", file=sys.stderr)
            # The first to end takes the others along, under torchrun: not before the summary.
            deadline = time.monotonic() + self._tick + 3
            while not summary.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(1)
        except Exception as error:  # whatever it is, the run must end
            print(f"megasd: error: {why}; no report of it: {error}", file=sys.stderr)
        finally:
            os._exit(EXIT_CODE)

    def _insist(self, why: str) -> None:
        """Ends this process after about twice the time that it takes where files answer."""
        seconds = 8 * self._tick + 10
        said = f"megasd: error: {why}; {self._folder} does not answer; stacks of rank {self._rank}:"
        threading.Timer(seconds, print, (said,), {"file": sys.stderr, "flush": True}).start()
        threading.Timer(seconds + 3, os._exit, (EXIT_CODE,)).start()
        # By a thread of C: a write that hangs would keep Python's lock from the timers.
        faulthandler.dump_traceback_later(seconds + 1)

    def _write_report(self) -> None:
        # Not into a file that may hang: all of Python stands still meanwhile.
        with open(os.memfd_create("stacks"), "w+b") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            written = stacks.read()
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"rank-{self._rank}.stacks").write_bytes(written)
        # By a rename: whoever reads it reads all of it.
        _write(self._folder / f"rank-{self._rank}.json", json.dumps(asdict(self._place())))

    def _place(self) -> Place:
        line = collective = ""
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith(_COLLECTIVES):
                collective = name  # the outermost is what was called
            elif file.startswith(_OUR_FILES) and file != together.__file__ and not line:
                line = f"{file.removeprefix(_OUR_FILES)}:{frame.f_lineno} in {name}"
            frame = frame.f_back
        return Place(
            host=self._hosts[self._rank],
            phase=self._phases.current or "none",
            begun=self._phases.begun,
            line=line,
            collective=collective,
            waits_for=waiting.all_waits(),
        )

    def _read_reports(self) -> dict[int, Place]:
        files = {rank: self._folder / f"rank-{rank}.json" for rank in range(len(self._hosts))}
        return {
            rank: Place(**json.loads(file.read_text()))
            for rank, file in files.items()
            if file.exists()
        }


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)
