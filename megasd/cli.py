"""The command line. Imports nothing heavy: what a command needs is imported when it runs.

Exit codes: 0 done, 2 the user's input cannot be used (one sentence per fault on stderr). Start it
again after 1, trouble that may pass, like a full disk; 85, a run that was sent SIGUSR1, SIGTERM
or SIGHUP and has saved what there was to save; 86, nothing happened any more and the watchdog ended
the run. 130 is the same as 85, but by Ctrl-C: whoever pressed it decides. 130, 143 and 129 are of a
run that was told twice, too, and ended at once.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megasd import __version__
from megasd.algorithms import ALGORITHMS
from megasd.configuration.describe import plan
from megasd.configuration.load import COMMAND_LINE, Config, ConfigError, read_config, to_yaml
from megasd.configuration.resume import existing_run, read_resumed
from megasd.configuration.validate import check_run, validate
from megasd.doctor.doctor import add_doctor_command
from megasd.launch.flags import add_flags
from megasd.planner.command import add_plan_command
from megasd.process import interrupt, startup
from megasd.process.errors import TryAgainError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, returns the exit code."""
    args = _parse(arguments)
    try:
        return args.run(args) or 0
    except ConfigError as error:
        if _is_first_rank():  # every rank finds the same
            _print_errors(error.errors)
        return 2
    except ValueError as error:
        if not _is_ours(error.__traceback__):
            raise  # from a library: not a sentence for users, the traceback is needed
        _print_own(error)
        return 2
    except TryAgainError as error:
        if _is_first_rank() or not error.on_every_rank:
            _print_own(error)
        return 1
    except KeyboardInterrupt:  # a run has its own way to stop
        print("megasd: interrupted", file=sys.stderr)
        return interrupt.INTERRUPTED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megasd", description="Post-train a language model that is its own teacher."
    )
    parser.add_argument("--version", action="version", version=f"megasd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_compare(commands)
    _add_submit(commands)
    add_plan_command(commands)
    add_doctor_command(commands)

    algorithms = commands.add_parser(
        "algorithms", help="list the algorithms: paper, what the teacher reads, passes, memory"
    )
    algorithms.add_argument(
        "--json", action="store_true", help="a list of objects, with defaults and their source"
    )
    algorithms.set_defaults(run=_algorithms)

    export = commands.add_parser("export", help="write a run's policy as a Hugging Face folder")
    export.add_argument("run_folder", metavar="RUN_FOLDER")
    export.add_argument("--to", required=True, metavar="FOLDER", help="must not exist or be empty")
    export.set_defaults(run=_export)

    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "items") and not any(item.startswith("-") for item in rest):
        args.items += rest  # overrides behind an option, which argparse does not gather
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model as a config file says, or resume a run",
        usage="megasd train CONFIG [key=value ...] [--dry-run [--world-size N]]\n"
        "       megasd train [CONFIG] --resume RUN_FOLDER [key=value ...]",
        description="Every process of the run starts this command (srun, torchrun). key=value "
        "overrides the config file: optimizer.lr=1e-6. Of a resumed run only run.steps, "
        "parallel.*, checkpoint.*, metrics.*, evaluation.* and watchdog.* may change.",
    )
    train.add_argument("items", nargs="*", metavar="CONFIG | key=value")
    train.add_argument("--resume", metavar="RUN_FOLDER", help="continue its newest checkpoint")
    train.add_argument(
        "--dry-run", action="store_true", help="validate, print config and plan, and stop"
    )
    train.add_argument("--world-size", type=int, metavar="N", help="processes a dry run plans for")
    train.set_defaults(run=_train)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="train several algorithms alike: one table, one plot",
        usage="megasd compare CONFIG --algorithms A,B,... [--seeds N] [--launcher COMMAND] "
        "[key=value ...]",
        description="Trains each algorithm from the same warm start (compare.warm_start) on the "
        "same prompts, in run.directory/<run.name>-compare. What is there already is not trained "
        "again: start an interrupted comparison again as it was.",
    )
    compare.add_argument("items", nargs="*", metavar="CONFIG | key=value")
    compare.add_argument("--algorithms", required=True, metavar="A,B", help="the first is the base")
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="from run.seed on (3)")
    compare.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help='starts each run, like "torchrun --nproc-per-node 8 --no-python"',
    )
    compare.set_defaults(run=_compare)


def _add_submit(commands: Any) -> None:
    submit = commands.add_parser(
        "submit",
        help="start a run as a Slurm job, or continue it",
        usage="megasd submit CONFIG [key=value ...] --nodes N [--time LIMIT] [--site FILE] ...",
        description="Checks everything against the nodes, then submits one job that saves before "
        "its time is over, goes back to the queue, and resumes. Prints the job's id.",
    )
    add_flags(submit)
    submit.set_defaults(run=_submit)


def _train(args: argparse.Namespace) -> int:
    """The exit code."""
    if not args.dry_run:
        interrupt.listen()  # before anything heavy is imported, which may start threads
        startup.begin()
    path, overrides = _config_and_overrides(args.items)
    world_size = _world_size(args)
    if args.resume is not None:
        loaded = read_resumed(Path(args.resume), path, overrides)
    elif path is not None:
        loaded = read_config(path, overrides)
    else:
        raise ConfigError([f"{COMMAND_LINE}: no config file; name one, or --resume RUN_FOLDER"])

    # Only one rank looks: it may make the folder before the others get here.
    new_run = _is_first_rank() and args.resume is None and not args.dry_run
    if errors := loaded.errors + validate(loaded, world_size=world_size, new_run=new_run):
        raise ConfigError(errors)
    assert loaded.config is not None, "what could not be read is an error"
    if args.dry_run:
        _print_dry_run(loaded.config, world_size, resumed=args.resume is not None)
        return 0
    from megasd.run import start_training

    is_done = start_training(loaded.config, resume=args.resume is not None)
    return 0 if is_done else interrupt.exit_code()


def _submit(args: argparse.Namespace) -> None:
    from megasd.launch.submit import submit

    path, overrides = _config_and_overrides(args.items)
    submit(path, overrides, args)


def _config_and_overrides(items: Sequence[str]) -> tuple[str | None, list[str]]:
    path = next((item for item in items if "=" not in item), None)
    return path, [item for item in items if item is not path]


def _compare(args: argparse.Namespace) -> None:
    path, overrides = _config_and_overrides(args.items)
    if path is None:
        raise ConfigError([f"{COMMAND_LINE}: no config file; name one"])
    # As Ctrl-C: the run that it waits for is asked to stop, and saves.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from megasd.compare.compare import compare
    from megasd.compare.runs import compose

    algorithms = args.algorithms.split(",")
    if failures := compare(compose(path, algorithms, args.seeds, overrides, args.launcher)):
        raise ConfigError(failures)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _is_first_rank() -> bool:
    return not (_rank().isdecimal() and int(_rank()) > 0)


def _world_size(args: argparse.Namespace) -> int:
    if args.world_size is None:
        name = "WORLD_SIZE" if "WORLD_SIZE" in os.environ else "SLURM_NTASKS"
        size = os.environ.get(name, "1")
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError([f"environment: {name}={size}: not a number of processes; unset it"])
        return int(size)
    if not args.dry_run or args.world_size < 1:
        raise ConfigError(
            [
                f"{COMMAND_LINE}: --world-size {args.world_size}: plans a --dry-run for 1 process "
                "or more; a run takes it from its launcher"
            ]
        )
    return args.world_size


def _print_dry_run(config: Config, world_size: int, *, resumed: bool) -> None:
    print(to_yaml(config))
    print(plan(config, world_size))
    if not resumed:
        for note in check_run(config, new_run=True):
            print(f"megasd: note: {note}", file=sys.stderr)


def _algorithms(args: argparse.Namespace) -> None:
    from megasd.algorithms.listing import as_text, describe

    methods = [describe(name) for name in ALGORITHMS]
    print(json.dumps(methods) if args.json else as_text(methods))


def _export(args: argparse.Namespace) -> None:
    run_folder, target = existing_run(Path(args.run_folder)), Path(args.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError([f"--to {target}: exists and is not an empty folder; choose another"])
    from megasd.weights.conversion import megatron_to_hf

    megatron_to_hf(run_folder, target)


def _print_errors(errors: Sequence[str]) -> None:
    for error in errors:
        print(f"megasd: error: {error}", file=sys.stderr)


def _print_own(error: Exception) -> None:
    """Perhaps this rank alone met it: every rank speaks."""
    _print_errors([str(error) if _is_first_rank() else f"rank {_rank()}: {error}"])


def _is_ours(traceback: TracebackType | None) -> bool:
    """True if megasd's own code raised: its ValueErrors are sentences for users."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    return str(traceback.tb_frame.f_globals.get("__name__")).startswith("megasd.")


if __name__ == "__main__":  # checkpoints are saved from processes that import this module anew
    sys.exit(main())
