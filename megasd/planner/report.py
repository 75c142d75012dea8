"""A plan as text for people and as plain values for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megasd.planner.around import Around
from megasd.planner.buffers import total_parameters
from megasd.planner.duration import Duration
from megasd.planner.hardware import GB, GIB, GPUS_PER_NODE, TERA, shown
from megasd.planner.memory import Memory, Scenario
from megasd.planner.search import Layout


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a scenario; without memory and duration where it cannot run at all."""

    scenario: Scenario
    notes: list[str]
    faults: list[str]
    memory: Memory | None
    duration: Duration | None
    around: Around | None
    layouts: list[Layout]

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.fits


def as_values(plan: Plan) -> dict[str, Any]:
    """For `--json`: bytes, seconds, keys as in a configuration."""
    held, time = plan.memory, plan.duration
    return {
        "fits": plan.fits,
        "gpus": f"{plan.scenario.machine.gpu.name}:{plan.scenario.machine.count}",
        "parameters": total_parameters(plan.scenario.model),
        "notes": plan.notes,
        "faults": plan.faults,
        "capacity": plan.scenario.machine.gpu.memory_bytes,
        "bytes_per_rank": {} if held is None else held.kinds,
        "peak_bytes": {} if held is None else held.phases,
        "largest": None if held is None else held.largest,
        "seconds_per_step": {} if time is None else time.phases,
        "seconds_of_update": {} if time is None else _parts(time),
        "mfu_of_update": None if time is None else time.mfu,
        "around": {} if plan.around is None else asdict(plan.around),
        "layouts": [
            {
                "overrides": layout.overrides,
                "gpus": layout.gpus,
                "peak_bytes": layout.memory.peak,
                "seconds_per_step": layout.duration.phases,
            }
            for layout in plan.layouts
        ],
        "assumptions": asdict(plan.scenario.assumed),
    }


def _parts(time: Duration) -> dict[str, float]:
    return {
        "communication": time.communication,
        "bubble": time.bubble,
        "optimizer": time.optimizer,
    }


def as_text(plan: Plan) -> str:
    lines = [*_header(plan), ""]
    if plan.memory is None or plan.duration is None or plan.around is None:
        lines += ["It cannot run as it is:", *(f"  {fault}" for fault in plan.faults)]
    else:
        lines += [*_verdict(plan.memory), "", *_kinds(plan.memory), ""]
        lines += [*_phases(plan.memory, plan.duration), "", *_around(plan.scenario, plan.around)]
    lines += ["", *_layouts(plan.layouts), "", *_assumptions(plan.scenario)]
    return "\n".join(lines)


def _header(plan: Plan) -> list[str]:
    scenario = plan.scenario
    gpu, count = scenario.machine.gpu, scenario.machine.count
    return [
        f"{gpu.name} x {count}: {gpu.memory_bytes / GIB:.0f} GiB, {gpu.bf16_flops / TERA:.0f} "
        f"TFLOP/s in bfloat16, {gpu.memory_bandwidth / TERA:.1f} TB/s each (published)",
        f"{scenario.model.hf_config['model_type']}: {total_parameters(scenario.model):,} "
        "parameters",
        *plan.notes,
    ]


def _verdict(held: Memory) -> list[str]:
    phase = max(held.phases, key=held.phases.__getitem__)
    if held.peak > held.capacity:
        verdict = "It does NOT fit"
    elif not held.fits:
        verdict = "It does NOT fit (no room in the engine's cache for one longest sequence)"
    else:
        verdict = "It fits"
    return [
        f"{verdict}: {_gib(held.peak)} of {_gib(held.capacity)} GiB on the fullest rank (stage "
        f"{held.stage}), in the phase {phase}; most is {held.largest.replace('_', ' ')}."
    ]


def _kinds(held: Memory) -> list[str]:
    rows = [(name.replace("_", " "), _gib(value)) for name, value in held.kinds.items() if value]
    return table([("GiB of the fullest rank", ""), *rows])


def _phases(held: Memory, time: Duration) -> list[str]:
    rows = [
        (name, _gib(held.phases[name]), f"{seconds:.1f}") for name, seconds in time.phases.items()
    ]
    rows.append(("step", _gib(held.peak), f"{time.total:.1f}"))
    parts = ", ".join(f"{name} {value:.1f}" for name, value in _parts(time).items())
    said = f"of the update: {parts} seconds; {time.mfu:.0%} of the peak is the model's own products"
    return [*table([("phase", "GiB", "seconds"), *rows]), said]


def _around(scenario: Scenario, found: Around) -> list[str]:
    ranks = min(scenario.machine.count, GPUS_PER_NODE)
    return [
        f"{scenario.config.run.steps} steps take {shown(found.run_seconds)} without evaluations",
        f"a checkpoint is {found.checkpoint_bytes / GB:,.0f} GB, at most "
        f"{found.kept_bytes / GB:,.0f} GB on the disk; training stands still for "
        f"{shown(found.pausing_seconds)}, files are written for {shown(found.writing_seconds)}",
        f"a node needs {found.host_bytes / GB:,.0f} GB of its own memory for it, for what the "
        f"trainer parks and for the rollouts, of which each of {ranks} ranks hears all: "
        f"{found.rollout_bytes / GB:.2f} GB",
        *found.warnings,
    ]


def _layouts(layouts: Sequence[Layout]) -> list[str]:
    if not layouts:
        return ["No layout fits on these GPUs; take more of them, or shorter sequences."]
    rows = [
        (
            f"{layout.duration.total:.1f}",
            f"{layout.gpus}",
            _gib(layout.memory.peak),
            " ".join(f"{key}={_value(value)}" for key, value in layout.overrides.items())
            or "(as it is)",
        )
        for layout in layouts
    ]
    said = "layouts that fit, the least seconds times GPUs first (without the sync)"
    header = ("seconds", "GPUs", "GiB", said)
    return table([header, *rows], text_last=True)


def _value(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    )


def _assumptions(scenario: Scenario) -> list[str]:
    said = ", ".join(f"{name} {value:g}" for name, value in asdict(scenario.assumed).items())
    return [
        "Assumed, not measured (change with --assume NAME=VALUE):",
        *(f"  {line}" for line in _wrapped(said.split(", "))),
    ]


def _wrapped(words: Sequence[str], width: int = 96) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 2 + len(word) > width:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return lines


def table(rows: Sequence[Sequence[str]], *, text_last: bool = False) -> list[str]:
    """Columns: the first to the left, numbers to the right, a last one of text to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place == (len(row) - 1 if text_last else 0) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"
