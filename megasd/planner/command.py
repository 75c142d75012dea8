"""`megasd plan`: whether a configuration fits on GPUs that need not be here, and how long it takes.

Imports nothing heavy until it runs.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasd.planner.presets import NAMES, full_name

if TYPE_CHECKING:
    from megasd.configuration.load import Config
    from megasd.planner.hardware import Assumptions, Machine
    from megasd.planner.memory import Scenario
    from megasd.planner.model import Model
    from megasd.planner.report import Plan


def add_plan_command(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory and time of a config on GPUs that need not be here",
        usage="megasd plan CONFIG --gpus TYPE:NUMBER [key=value ...] [--model NAME] [--json]\n"
        "       megasd plan --published",
        description="Says whether the config fits on so many GPUs, what takes most of their "
        "memory, how long a step takes, and which layouts would be quicker. Exit code 1: it does "
        "not fit.",
    )
    plan.add_argument("items", nargs="*", metavar="CONFIG | key=value")
    plan.add_argument("--gpus", default="", metavar="TYPE:NUMBER", help="like H200:64")
    plan.add_argument(
        "--model", choices=NAMES, help="plan for this model (a size: of Qwen3), without its folder"
    )
    plan.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace an assumption that the plan prints, like mean_length=0.3",
    )
    plan.add_argument("--json", action="store_true", help="plain values: bytes and seconds")
    plan.add_argument(
        "--published",
        action="store_true",
        help="no config: the planner against steps whose time others published",
    )
    plan.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """The exit code."""
    from megasd.planner import published
    from megasd.planner.report import as_text, as_values

    if args.published:
        print(published.as_text())
        return 0
    plan = make_plan(args.items, gpus=args.gpus, model=args.model, assume=args.assume)
    print(json.dumps(as_values(plan)) if args.json else as_text(plan))
    return 0 if plan.fits else 1


def make_plan(
    items: Sequence[str],
    *,
    gpus: str,
    model: str | None = None,
    assume: Sequence[str] = (),
    suggest: bool = True,
) -> "Plan":
    """The plan of a config file and overrides; raises ConfigError or ValueError, in sentences.

    `suggest` False leaves out the search for other layouts, which takes seconds.
    """
    from megasd.configuration.load import COMMAND_LINE, ConfigError, load_config
    from megasd.planner.around import around
    from megasd.planner.duration import duration
    from megasd.planner.hardware import parse_gpus
    from megasd.planner.memory import memory
    from megasd.planner.report import Plan
    from megasd.planner.search import best_layouts, faults

    path = next((item for item in items if "=" not in item), None)
    if path is None:
        raise ConfigError([f"{COMMAND_LINE}: no config file; name one"])
    overrides = [item for item in items if item is not path]
    if model is not None:
        overrides.append(f"model.path={full_name(model)}")
    machine, assumed = parse_gpus(gpus), read_assumptions(assume)
    config = load_config(path, overrides)
    scenario, notes = scenario_of(config, machine, assumed)
    found = faults(scenario)
    held = None if found else memory(scenario)
    time = None if held is None else duration(scenario, held)
    return Plan(
        scenario=scenario,
        notes=notes,
        faults=found,
        memory=held,
        duration=time,
        around=None if held is None or time is None else around(scenario, held, time),
        layouts=best_layouts(scenario) if suggest else [],
    )


def scenario_of(
    config: "Config", machine: "Machine", assumed: "Assumptions"
) -> tuple["Scenario", list[str]]:
    """What a plan is made of, and notes on where its models come from."""
    from megasd.planner.memory import Scenario

    policy, notes = read_model(config.model.path, "model.path")
    teacher, more = _teacher_model(config)
    scenario = Scenario(
        config=config, model=policy, machine=machine, assumed=assumed, teacher_model=teacher
    )
    return scenario, notes + more


def read_model(path: str, key: str) -> tuple["Model", list[str]]:
    """The sizes of the folder's config.json; without a folder, of the preset with its name."""
    from megasd.planner.model import Model
    from megasd.planner.presets import preset, preset_of_path
    from megasd.weights.hf_folder import read_hf_config

    if Path(path).is_dir():
        return Model.of(read_hf_config(path)), []
    name = preset_of_path(path)
    if name is None:
        raise ValueError(
            f"{key}: there is no folder {path}, and it is not named after a preset; give the "
            f"model's local folder, or --model with one of {', '.join(NAMES)}"
        )
    return Model.of(preset(name)), [f"{key}: no folder {path} here; planned as {full_name(name)}"]


def _teacher_model(config: "Config") -> tuple["Model | None", list[str]]:
    if config.teacher.weights != "checkpoint":
        return None, []
    if config.teacher.path is None:
        raise ValueError("teacher.path: missing; give the Hugging Face folder of the teacher")
    return read_model(config.teacher.path, "teacher.path")


def read_assumptions(items: Sequence[str]) -> "Assumptions":
    """The defaults with `NAME=VALUE` laid over them."""
    import dataclasses

    from megasd.planner.hardware import Assumptions

    known = {field.name for field in dataclasses.fields(Assumptions)}
    values: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise ValueError(f"--assume {item}: write NAME=NUMBER") from None
        if name not in known or not values[name] > 0:
            raise ValueError(
                f"--assume {item}: give one of {', '.join(sorted(known))} a number above 0"
            )
    return dataclasses.replace(Assumptions(), **values)
