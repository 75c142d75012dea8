"""`megasd submit`: everything is checked before a job is in the queue."""

import argparse
import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from megasd.configuration.load import (
    COMMAND_LINE,
    Config,
    ConfigError,
    Loaded,
    read_config,
    to_yaml,
)
from megasd.configuration.resume import read_resumed
from megasd.configuration.validate import run_folder
from megasd.launch.checks import Nodes, check_job, nodes_for, on_gpus
from megasd.launch.nemo import submit_with_nemo_run
from megasd.launch.render import CONFIG, SCRIPT, SlurmJob, render
from megasd.launch.site import Site, read_site
from megasd.launch.timing import check_times, choose_lead, estimate
from megasd.metrics.run_folder import CONFIG_FILE
from megasd.process.errors import TryAgainError

ANSWER_SECONDS = 120  # Slurm's own limit of a message is 10 by default, and it tries again
# As Slurm says that it did not get through to its controller, which passes.
AWAY = re.compile(
    r"contact slurm controller|Connection (refused|timed out|reset)|Socket timed out"
    r"|Communication|Zero Bytes were transmitted|temporarily un(able|available)|controller .* busy",
    re.IGNORECASE,
)


def submit(path: str | None, overrides: Sequence[str], flags: argparse.Namespace) -> None:
    """Raises ConfigError with every reason why the job would not run; prints the ids of its jobs.

    A run that has begun is continued: its folder decides, not a flag.
    """
    if path is None:
        raise ConfigError([f"{COMMAND_LINE}: no config file; name one"])
    site, errors = read_site(flags)
    loaded, new_run = _read(path, overrides)
    errors += check_job(loaded, flags.nodes, site, new_run=new_run, chain=flags.chain)
    if errors or loaded.config is None:
        raise ConfigError(errors)
    config = loaded.config
    nodes = nodes_for(config, flags.nodes, site)
    site, warnings = _in_time(on_gpus(loaded).config or config, nodes, site)
    for warning in warnings:
        print(f"megasd: warning: {warning}", file=sys.stderr)
    job = SlurmJob(
        run=run_folder(config).absolute(),
        submission=_next_submission(run_folder(config).absolute()),
        summary=_summary(config.run.name, nodes, new_run=new_run),
        nodes=nodes,
        site=site,
        is_chained=flags.chain > 1,
        working_directory=Path.cwd(),
    )
    script = render(job)
    if flags.dry_run:
        print(script)
        return
    by_nemo_run = flags.via == "nemo-run"
    if not (by_nemo_run and site.ssh):
        # Plain sbatch accepts what no partition can ever run, and leaves it pending.
        _slurm("sbatch", "--test-only", script=script)
    write(job, script, to_yaml(config))
    ids = submit_with_nemo_run(job, flags.chain) if by_nemo_run else sbatch(job, flags.chain)
    print(f"megasd: {job.summary}", file=sys.stderr)
    print(
        f"megasd: logs in {job.run / 'logs'}; to cancel: scancel {' '.join(ids)}", file=sys.stderr
    )
    print("\n".join(ids))


def _read(path: str, overrides: Sequence[str]) -> tuple[Loaded, bool]:
    """The configuration, and whether its run is yet to begin."""
    loaded = read_config(path, overrides)
    if loaded.config is None:
        return loaded, True
    folder = run_folder(loaded.config)
    if not (folder / CONFIG_FILE).is_file():
        return loaded, True
    return read_resumed(folder, path, overrides), False


def _in_time(config: Config, nodes: Nodes, site: Site) -> tuple[Site, list[str]]:
    """The site with its lead chosen, and what may not be done in time; ConfigError: never."""
    timing = estimate(config, nodes, site.gpu)
    site = dataclasses.replace(site, signal_lead_seconds=choose_lead(timing, site))
    errors, warnings = check_times(timing, config, site) if timing else ([], [])
    if errors:
        raise ConfigError(errors)
    return site, warnings


def _next_submission(run: Path) -> Path:
    folders = (run / "submissions" / f"{number:03d}" for number in count(1))
    return next(folder for folder in folders if not folder.exists())


def _summary(name: str, nodes: Nodes, *, new_run: bool) -> str:
    engines = ""
    if nodes.engines:
        size = _count(nodes.gpus_per_engine, "GPU")
        where = _count(nodes.serve, "node")
        engines = f", and {_count(nodes.engines, 'engine')} of {size} on {where}"
    return (
        f"{'run' if new_run else 'resumed run'} {name}: {_count(nodes.train, 'node')} x "
        f"{_count(nodes.gpus_per_node, 'GPU')} = {_count(nodes.ranks, 'rank')}{engines}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def write(job: SlurmJob, script: str, config: str) -> None:
    """RUN/submissions/NNN: the script and the configuration that it starts with."""
    (job.run / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folder of a log
    job.submission.mkdir(parents=True)
    (job.submission / CONFIG).write_text(config, encoding="utf-8")
    (job.submission / SCRIPT).write_text(script, encoding="utf-8")


def sbatch(job: SlurmJob, chain: int) -> list[str]:
    """The ids of the jobs; what fails midway names those that are in the queue already."""
    ids: list[str] = []
    for _ in range(chain):
        try:
            said = _slurm("sbatch", "--parsable", str(job.submission / SCRIPT))
        except (ConfigError, TryAgainError) as error:
            if not ids:
                raise
            queued = f"{error}; in the queue already, of this chain: {' '.join(ids)}"
            raise (
                ConfigError([queued]) if isinstance(error, ConfigError) else TryAgainError(queued)
            ) from error
        ids.append(said.partition(";")[0])
    return ids


def _slurm(*command: str, script: str | None = None) -> str:
    """What it prints; ConfigError with Slurm's own words if it refuses, TryAgainError where its
    controller is away."""
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except FileNotFoundError:
        raise ConfigError(
            [f"{command[0]}: not found; submit where Slurm is, or print the script with --dry-run"]
        ) from None
    except subprocess.TimeoutExpired:
        raise TryAgainError(
            f"{shown}: no answer in {ANSWER_SECONDS} seconds; Slurm may have taken the job all the "
            "same: look at squeue --me, then submit again"
        ) from None
    if done.returncode:
        said = done.stderr.strip().replace("\n", "; ")
        if AWAY.search(said):
            raise TryAgainError(f"{shown}: {said}; submit again when Slurm answers")
        raise ConfigError([f"{shown}: {said}; change what the job asks for"])
    return done.stdout.strip()
