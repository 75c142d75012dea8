"""Everything that only a GPU can show, on one GPU, in ten minutes: steps that stop for nothing.

    python tools/gpu_check.py --list                    # the steps, their limits and commands
    python tools/gpu_check.py                           # all of them, worth most first
    python tools/gpu_check.py --steps head,te --show 200
    python tools/gpu_check.py --budget 350              # then, elsewhere or later:
    python tools/gpu_check.py --budget 400 --from vllm_dense

Each step is a process with a time limit of its own, killed with all it has started. Its last lines
and the figures that it prints (`FIGURES {...}`) are in FOLDER/gpu_check.json after every step, its
whole output in FOLDER/STEP.log, what it writes in FOLDER/STEP/. Checks run side by side, whatever
is measured runs alone. CUDA_VISIBLE_DEVICES chooses the GPU. Exit code 1: a step failed, ran into
its limit, or was not started for want of time; steps whose packages are not installed are skipped.
Without a GPU it says why, lists what it would run, and ends with 0.
"""

import argparse
import contextlib
import heapq
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
BUDGET, LEAST = 600.0, 10.0  # seconds: of all steps; with less left no step is started
PYTEST = "{python} -m pytest -p no:cacheprovider -q -s --tb=short --durations=5"
BENCH = "{python} tools/bench_gpu.py"
RL = (
    "{python} tools/make_quickstart_data.py {own}/inputs"
    " && {python} tools/make_tiny_model.py {own}/model"
    " --hidden 256 --heads 4 --kv-heads 2 --head-dim 64 --intermediate 512"
    " && {python} -m megasd.cli train configs/quickstart.yaml"
    " run.device=cuda run.name=run run.directory={own} run.steps=6 model.path={own}/model"
    " model.dtype=bfloat16 data.files=[{own}/inputs/rl.jsonl]"
    " evaluation.files=[{own}/inputs/heldout.jsonl] evaluation.every=6 evaluation.samples=1"
    " checkpoint.every=3 optimizer.warmup_steps=2"
    " algorithm.name=opsd"  # learns from what a random model writes: no reward is needed
)
RESUMED = " && {python} -m megasd.cli train --resume {own}/run run.steps=8"
WITH_VLLM = " rollout.engine=vllm rollout.vllm.kv_cache_gib=2"
IN_FLOAT8 = " model.fp8.recipe=blockwise model.fp8.meter_every=2 rollout.vllm.quantization=fp8"
SPEED = " && {python} tools/bench_gpu.py run {own}/run"
VLLM = ("vllm",)
ENGINE = ("transformer_engine",)
# What jobs and launchers say would make ranks of the steps.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the table."""

    name: str
    limit: float  # seconds
    command: str  # of bash; {python}, {folder}: of the check, {own}: of this step
    needs: tuple[str, ...] = ()  # packages: without them there is nothing to run
    alone: bool = False  # it measures time, or takes all of the memory
    environment: Mapping[str, str] = field(default_factory=dict)


def tests(name: str, limit: float, what: str, **more: Any) -> Step:
    return Step(name=name, limit=limit, command=f"{PYTEST} {what}", **more)


LOCAL = {"MEGASD_TEST_LAYERS": "local"}  # tests/gpu/alone.py
VLLM_TESTS = "tests/gpu/test_vllm.py"
SLEPT = f"{VLLM_TESTS}::test_shared_memory_feeds_an_engine_that_slept"
FLOAT8 = f"{VLLM_TESTS}::test_float8_weights_sample_close_to_their_originals"
FRESH = " ".join(
    f"--ignore tests/gpu/test_{name}.py" for name in ("vllm", "backend", "float8", "doctor")
)
STEPS = (
    Step(
        name="doctor",
        limit=60,
        command="{python} -m megasd.cli doctor --folder {own}",
        alone=True,
    ),
    Step(name="machine", limit=40, command=f"{BENCH} machine", alone=True),
    # The longest first: the others fill up beside it.
    tests("float8", 240, "tests/gpu/test_float8.py", needs=ENGINE),
    tests("te", 100, "tests/gpu/test_transformer_engine.py", needs=ENGINE),
    tests("policy_te", 120, "tests/gpu/test_policy.py", needs=ENGINE),
    tests("policy_local", 120, "tests/gpu/test_policy.py", environment=LOCAL),
    tests("head", 100, "tests/gpu/test_head.py"),
    Step(name="rl_hf", limit=150, command=RL + RESUMED + SPEED),
    tests("checkpoint", 100, "tests/gpu/test_checkpoint.py"),
    tests("step", 100, "tests/gpu/test_step.py", needs=ENGINE),
    tests("planner", 90, "tests/gpu/test_planner.py", needs=ENGINE),
    tests("planner_local", 90, "tests/gpu/test_planner.py", environment=LOCAL),
    tests("backend", 120, "tests/gpu/test_backend.py"),
    tests("places", 60, "tests/gpu/test_places.py"),
    tests("doctor_tests", 90, "tests/gpu/test_doctor.py"),
    Step(name="bench_head", limit=90, command=f"{BENCH} head", alone=True),
    Step(name="bench_passes", limit=90, command=f"{BENCH} passes", alone=True),
    tests("vllm_dense", 120, f"'{SLEPT}[dense]'", needs=VLLM, alone=True),
    Step(name="rl_vllm", limit=180, command=RL + WITH_VLLM + SPEED, needs=VLLM),
    Step(
        name="rl_float8",
        limit=180,
        command=RL + WITH_VLLM + IN_FLOAT8 + SPEED,
        needs=VLLM + ENGINE,
    ),
    tests("vllm_float8", 180, FLOAT8, needs=VLLM),
    # Without the tests that start processes of their own.
    tests("one_process", 240, f"tests/gpu {FRESH}"),
    tests("vllm_moe", 120, f"'{SLEPT}[moe]'", needs=VLLM, alone=True),
    Step(
        name="bench_float8",
        limit=60,
        command=f"{BENCH} passes --fp8 blockwise",
        needs=ENGINE,
        alone=True,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    parser.add_argument("--steps", metavar="A,B", help="these, in the order of the list (all)")
    parser.add_argument("--from", dest="first", metavar="STEP", help="this one and all after it")
    parser.add_argument("--skip", metavar="A,B", default="", help="not these")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all (600)")
    parser.add_argument("--width", type=int, default=6, help="checks side by side (6)")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-check"), help="what is left")
    parser.add_argument("--json", type=Path, help="the results (FOLDER/gpu_check.json)")
    parser.add_argument("--show", type=int, default=25, help="last lines of a failed step (25)")
    args = parser.parse_args(arguments)
    try:
        steps = chosen(STEPS, args.steps, args.first, args.skip)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print_list(steps, args.width, args.budget)
        return 0
    if reason := why_no_gpu():
        print(f"nothing is run: {reason}. With a GPU it would run:\n")
        print_list(steps, args.width, args.budget)
        return 0
    signal.signal(signal.SIGTERM, _end)
    file = args.json or args.folder / "gpu_check.json"
    check = Check(args.folder.resolve(), file.resolve(), args.budget, args.width, args.show)
    check.run(steps)
    return check.print_table()


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def chosen(
    steps: Sequence[Step], only: str | None, first: str | None, skip: str
) -> tuple[Step, ...]:
    """Raises ValueError for a name that no step has."""
    names = [step.name for step in steps]
    wanted = only.split(",") if only else names
    skipped = [name for name in skip.split(",") if name]
    asked = [*wanted, *skipped, *([first] if first else [])]
    if unknown := [name for name in asked if name not in names]:
        raise ValueError(f"no step {', '.join(unknown)}; --list names them")
    start = names.index(first) if first else 0
    return tuple(s for s in steps[start:] if s.name in wanted and s.name not in skipped)


def groups(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """What may run side by side: the checks between two measurements."""
    group: list[Step] = []
    for step in steps:
        if group and (step.alone or group[-1].alone):
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def at_worst(steps: Sequence[Step], width: int) -> float:
    """Seconds, when every step runs into its limit."""
    total = 0.0
    for group in groups(steps):
        ends = [0.0] * min(width, len(group))
        for step in group:
            heapq.heapreplace(ends, ends[0] + step.limit)
        total += max(ends)
    return total


def print_list(steps: Sequence[Step], width: int, budget: float) -> None:
    for number, group in enumerate(groups(steps), start=1):
        for step in group:
            lacks = ", ".join(_missing(step))
            environment = "".join(f"{name}={value} " for name, value in step.environment.items())
            command = environment + step.command.replace(PYTEST, "pytest")
            command = command.replace("{python}", "python")
            note = f"  (skipped: no {lacks})" if lacks else ""
            print(f"{number:>2} {step.name:<14} {step.limit:>4.0f} s  {command}{note}")
    limits = sum(step.limit for step in steps)
    print(
        f"\n{len(steps)} steps; those of one number run side by side, {width} at a time. If all "
        f"ran into their limits: {at_worst(steps, width):.0f} s ({limits:.0f} s one by one). What "
        f"the budget of {budget:.0f} s does not reach is not started"
    )


def why_no_gpu() -> str | None:
    """What is missing; None: torch can use a GPU."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU that it can use"


def _missing(step: Step) -> list[str]:
    return [package for package in step.needs if importlib.util.find_spec(package) is None]


@dataclass(kw_only=True)
class Result:
    """Of one step, as it stands in the JSON."""

    step: str
    state: str  # ok, failed, limit, skipped, not started
    rc: int | None = None  # exit status; 124: killed at its limit; null: not run
    seconds: float = 0.0
    limit: float = 0.0  # under which it ran: its own, or what was left
    began: float = 0.0  # seconds after the first
    command: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    last: list[str] = field(default_factory=list)

    @property
    def is_fine(self) -> bool:
        return self.state in ("ok", "skipped")


class Check:
    """One run over steps."""

    def __init__(self, folder: Path, file: Path, budget: float, width: int, show: int) -> None:
        self.folder, self.file, self.budget = folder, file, budget
        self.width, self.show = width, show
        self.results: list[Result] = []
        self._start, self._lock = time.monotonic(), threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._about = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": _commit()}
        folder.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)

    def run(self, steps: Sequence[Step]) -> None:
        try:
            for group in groups(steps):
                with ThreadPoolExecutor(max(1, min(self.width, len(group)))) as pool:
                    done = [pool.submit(self._run_one, step) for step in group]
                    try:
                        for one in done:
                            one.result()
                    except BaseException:
                        self.budget = 0.0  # nothing more is started
                        for process in list(self._running):
                            kill(process)
                        raise
        finally:
            self._write()

    def _passed(self) -> float:
        return time.monotonic() - self._start

    def _run_one(self, step: Step) -> None:
        limit = min(step.limit, self.budget - self._passed())
        result = Result(step=step.name, state="not started", limit=round(max(limit, 0.0), 1))
        result.began = round(self._passed(), 1)
        if missing := _missing(step):
            result.state, result.last = "skipped", [f"{', '.join(missing)} is not installed"]
        elif limit < min(LEAST, step.limit):
            result.last = ["no time is left of the budget"]
        else:
            print(f"[{result.began:6.1f} s] {step.name} ...", flush=True)
            self._execute(step, limit, result)
        with self._lock:
            self.results.append(result)
            self._write()
            said = summary(result.last)
            print(f"[{self._passed():6.1f} s] {step.name}: {result.state}  {said}", flush=True)
            if not result.is_fine and self.show:
                print("".join(f"    {line}\n" for line in result.last[-self.show :]), flush=True)

    def _execute(self, step: Step, limit: float, result: Result) -> None:
        own, log = self.folder / step.name, self.folder / f"{step.name}.log"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        result.command = step.command.format(python=sys.executable, folder=self.folder, own=own)
        begin = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", result.command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment_of(step),
                start_new_session=True,
            )
            self._running.add(process)
            try:
                result.rc = process.wait(limit)
            except subprocess.TimeoutExpired:
                result.rc = 124
            kill(process)
            self._running.discard(process)
        result.seconds = round(time.monotonic() - begin, 1)
        result.state = {0: "ok", 124: "limit"}.get(result.rc, "failed")
        text = log.read_text(errors="replace")
        result.figures = figures_in(text)
        lines = [line.rstrip()[:400] for line in text.splitlines() if line.strip()]
        result.last = lines[-(15 if result.is_fine else max(self.show, 60)) :]

    def _write(self) -> None:
        body = {
            **self._about,
            "seconds": round(self._passed(), 1),
            "steps": [asdict(result) for result in self.results],
        }
        part = self.file.with_name(self.file.name + ".part")
        part.write_text(json.dumps(body, indent=1) + "\n")
        part.replace(self.file)

    def print_table(self) -> int:
        """The exit code."""
        print(f"\n{'step':<14} {'state':<12} {'s':>6}  says")
        for result in self.results:
            print(
                f"{result.step:<14} {result.state:<12} {result.seconds:>6.1f}  "
                f"{summary(result.last)[:110]}"
            )
            for name, value in result.figures.items():
                print(f"{'':<36}{name} = {value}")
        print(f"{self._passed():.0f} s; {self.file}")
        return int(not all(result.is_fine for result in self.results))


def environment_of(step: Step) -> dict[str, str]:
    """Of a program that is all of its world, and finds this checkout first."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **quiet, "PYTHONPATH": path, **step.environment}


def kill(process: "subprocess.Popen[bytes]") -> None:
    """The step's group, and what it started in groups of their own, as engines are."""
    below: list[psutil.Process] = []
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # or what outlived the first of it
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def figures_in(text: str) -> dict[str, Any]:
    """Of all `FIGURES {...}`, later ones over earlier ones; pytest's dots may stand before them."""
    found: dict[str, Any] = {}
    for match in re.finditer(r"FIGURES (\{.*\})$", text, flags=re.MULTILINE):
        with contextlib.suppress(json.JSONDecodeError):  # two processes wrote into one line
            found |= json.loads(match[1])
    return found


def summary(lines: Sequence[str]) -> str:
    """Pytest's own, or the last line that is no figure."""
    for line in reversed(lines):
        if re.search(r"\b\d+ (passed|failed|skipped|errors?)\b", line):
            return line.strip("= ")
    return next((line for line in reversed(lines) if "FIGURES" not in line), "")


def _commit() -> str | None:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run(asked, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


if __name__ == "__main__":
    sys.exit(main())
