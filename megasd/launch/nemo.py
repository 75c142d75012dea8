"""Submission through NeMo-Run: the same job, in its catalogue, over SSH if the site says so.

NeMo-Run writes a batch script of its own, which starts a step on the first node, runs the lines
that it is given as a setup, and then a command. Ours is given as the setup and does not return, so
that signals, exit codes and quoting are those of the job script.
"""

import contextlib
import os
import shlex
import sys
from typing import Any

from megasd.configuration.load import ConfigError
from megasd.launch.render import SCRIPT, SlurmJob, directives


def submit_with_nemo_run(job: SlurmJob, chain: int) -> list[str]:
    """The ids of the jobs; their experiment is named as they are (`nemo experiment list`)."""
    try:
        import nemo_run as nemo  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            [f"--via nemo-run: cannot be imported ({error}); pip install 'megasd[slurm]'"]
        ) from error
    asked: dict[str, Any] = dict(directives(job))
    executor: Any = nemo.SlurmExecutor(
        account=job.site.account,
        nodes=job.nodes.train + job.nodes.serve,
        ntasks_per_node=job.nodes.gpus_per_node,
        time=job.site.time,
        job_name_prefix="megasd-",  # of its own logs; without one it asks for an account
        tunnel=_tunnel(nemo, job),
        packager=nemo.Packager(),  # megasd is where `python` of the site finds it
        setup_lines=f"exec bash {shlex.quote(str(job.submission / SCRIPT))}",
        additional_parameters={key.replace("-", "_"): v or True for key, v in asked.items()},
        poll_estimated_start_time=False,  # would wait for the job's start
    )
    # It prints much; our output is the ids.
    with contextlib.redirect_stdout(sys.stderr), nemo.Experiment(job.name) as experiment:
        for link in range(chain):
            never_reached = nemo.Script(inline="true")
            experiment.add(never_reached, executor=executor.clone(), name=f"{job.run.name}-{link}")
        experiment.run(detach=True, tail_logs=False)
    return [str(task.handle).rpartition("/")[2] for task in experiment.jobs]


def _tunnel(nemo: Any, job: SlurmJob) -> Any:
    if job.site.ssh is None:
        return nemo.LocalTunnel(job_dir="")
    user, _, host = job.site.ssh.rpartition("@")
    return nemo.SSHTunnel(
        host=host, user=user or os.environ.get("USER", ""), job_dir=str(job.run / "nemo-run")
    )
