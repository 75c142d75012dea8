"""`megasd submit`: everything is checked before a job is in the queue."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from megasd.configuration.load import COMMAND_LINE, ConfigError, Loaded, read_config, to_yaml
from megasd.configuration.resume import read_resumed
from megasd.configuration.validate import run_folder
from megasd.launch.checks import Nodes, check_job, nodes_for
from megasd.launch.nemo import submit_with_nemo_run
from megasd.launch.render import CONFIG, SCRIPT, SlurmJob, render
from megasd.launch.site import read_site
from megasd.metrics.run_folder import CONFIG_FILE


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
    """The ids of the jobs."""
    submit = ("sbatch", "--parsable", str(job.submission / SCRIPT))
    return [_slurm(*submit).partition(";")[0] for _ in range(chain)]


def _slurm(*command: str, script: str | None = None) -> str:
    """What it prints; ConfigError with Slurm's own words if it refuses."""
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(
            [f"{command[0]}: not found; submit where Slurm is, or print the script with --dry-run"]
        ) from None
    if done.returncode:
        said = done.stderr.strip().replace("\n", "; ")
        raise ConfigError([f"{shlex.join(command)}: {said}; change what the job asks for"])
    return done.stdout.strip()
