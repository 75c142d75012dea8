"""The job script: megasd/launch/train.sbatch.in with everything that is known filled in."""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from megasd import __version__
from megasd.launch.checks import Nodes
from megasd.launch.site import LEAD_SECONDS, Site
from megasd.process.interrupt import EXIT_CODE

TEMPLATE = "train.sbatch.in"
# Every rank has a socket to every other, and workers besides: 1024 files are the usual soft limit.
OPEN_FILES = """\
[ "$(ulimit -Sn)" = unlimited ] || [ "$(ulimit -Sn)" -ge 65536 ] ||
    ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
"""
SCRIPT = "job.sh"  # of a submission, in its folder
PREFLIGHT_SECONDS = 600  # it has limits of its own; this is for one that hangs all the same
CONFIG = "config.yaml"  # of a submission: resolved, so that later edits do not reach a queued job


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A run on a cluster, decided; `submission` is the folder of what is submitted."""

    run: Path
    submission: Path
    summary: str
    nodes: Nodes
    site: Site
    is_chained: bool
    working_directory: Path

    @property
    def name(self) -> str:
        """Of the run's folder and no other: jobs of one name run one after the other."""
        return f"{self.run.name}-{hashlib.sha256(bytes(self.run)).hexdigest()[:6]}"


def render(job: SlurmJob) -> str:
    """The whole script; raises ValueError if bash cannot read it (a site's `setup`)."""
    site, lead = job.site, job.site.signal_lead_seconds or LEAD_SECONDS
    values = {
        "DIRECTIVES": "\n".join(_directive(*item) for item in directives(job).items()),
        "SUMMARY": job.summary,
        "VERSION": __version__,
        "RUN": shlex.quote(str(job.run)),
        "SUBMISSION": shlex.quote(str(job.submission)),
        "SETUP": _setup(site),
        "ENVIRONMENT": "\n".join(
            f"export {key}={shlex.quote(value)}" for key, value in site.environment.items()
        ),
        "PATIENCE": str(max(lead - 30, lead // 2)),
        "ENGINES": _engines(job),
        "OPEN_FILES": OPEN_FILES.strip(),
        "PREFLIGHT": "yes" if site.preflight else "",
        "PREFLIGHT_SECONDS": str(PREFLIGHT_SECONDS),
        "DOCTOR": _doctor(job),
        "TRAIN": f'{_python(site, job)} megasd.cli train "$submission/{CONFIG}"',
        "NODES": str(job.nodes.train),
        "RANKS": str(job.nodes.ranks),
        "GPUS": str(job.nodes.gpus_per_node),
        "GRACE": str(site.grace_seconds),
        "SRUN": shlex.join(_srun(job, cpus=site.cpus_per_task)),
        "MAX_CRASHES": str(site.max_crashes),
        "MAX_REQUEUES": str(site.max_requeues),
        "CHAINED": "yes" if job.is_chained else "",
        "SAVED": str(EXIT_CODE),
    }
    template = files("megasd.launch").joinpath(TEMPLATE).read_text(encoding="utf-8")
    script = re.sub(r"\n{3,}", "\n\n", _filled(template, values))
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    if checked.returncode:
        raise ValueError(
            f"setup: bash cannot read the job script ({checked.stderr.strip()}); correct `setup` "
            "of the site file"
        )
    return script


def _setup(site: Site) -> str:
    """Run as in a shell of its author's: none that stops at unset variables."""
    lines = site.setup.strip()
    if not lines:
        return ""
    return f"""\
# The site's own lines. Activation scripts look at variables that nobody has set.
set +uo pipefail
trap 'say "setup: ended with $?: $BASH_COMMAND"' ERR
trap 'say "setup: ended the job with $? at: $BASH_COMMAND"' EXIT
{lines}

set +e -uo pipefail
trap - ERR EXIT
"""


def directives(job: SlurmJob) -> Mapping[str, str]:
    """What the script asks of sbatch; "" is a flag without a value."""
    site, nodes = job.site, job.nodes
    asked: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(nodes.train + nodes.serve),
        "ntasks-per-node": str(nodes.gpus_per_node),
        "time": site.time,
        "partition": site.partition,
        "account": site.account,
        "exclusive": "" if site.exclusive else None,
        "mem": site.mem,
        "cpus-per-task": None if site.cpus_per_task is None else str(site.cpus_per_task),
        "signal": f"B:USR1@{site.signal_lead_seconds or LEAD_SECONDS}",
        "requeue": "",
        "dependency": "singleton",
        "kill-on-invalid-dep": "yes",
        "open-mode": "append",
        "output": f"{str(job.run).replace('%', '%%')}/logs/%j.log",
        "chdir": str(job.working_directory),
    }
    if site.gpu_request == "gpus-per-node":
        asked["gpus-per-node"] = str(nodes.gpus_per_node)
    elif site.gpu_request == "gres":
        asked["gres"] = f"gpu:{nodes.gpus_per_node}"
    return {key: value for key, value in {**asked, **site.directives}.items() if value is not None}


def _directive(key: str, value: str) -> str:
    return f"#SBATCH --{key}" + (f"={_in_directive(value)}" if value else "")


def _in_directive(value: str) -> str:
    """Quoted as sbatch reads its directives, which is nearly, not quite, as a shell would."""
    if re.fullmatch(r"[\w.,:/%@=+-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _python(site: Site, job: SlurmJob) -> str:
    """The interpreter up to `-m`, inside apptainer if that is the site's way."""
    python = [site.interpreter, "-m"]
    if site.image and site.runtime == "apptainer":
        mounts = [part for mount in site.mounts for part in ("--bind", mount)]
        inside = ["--pwd", str(job.working_directory), *mounts, *site.runtime_options]
        python = ["apptainer", "exec", "--nv", *inside, site.image, *python]
    return shlex.join(python)


def _cpus_of_an_engine(job: SlurmJob) -> int | None:
    """Its part of what the node has for as many tasks as GPUs."""
    each = job.site.cpus_per_task
    return None if each is None else each * job.nodes.gpus_per_node // job.nodes.engines_per_node


def _srun(job: SlurmJob, *, cpus: int | None) -> list[str]:
    """What every srun of the job gets; `cpus` of each task."""
    site, arguments = job.site, []
    if site.mpi:
        arguments.append(f"--mpi={site.mpi}")
    if cpus is None:
        arguments.append("--cpu-bind=none")  # Slurm would bind a rank and its workers to one core
    else:
        arguments.append(f"--cpus-per-task={cpus}")
    if site.image and site.runtime == "pyxis":
        arguments.append(f"--container-image={site.image}")
        if site.mounts:
            pairs = (m if ":" in m else f"{m}:{m}" for m in site.mounts)
            arguments.append(f"--container-mounts={','.join(pairs)}")
        arguments += [f"--container-workdir={job.working_directory}", *site.runtime_options]
    return [*arguments, *site.srun]


def _engines(job: SlurmJob) -> str:
    """The second component of the job: an agent for each engine, on the nodes behind the ranks."""
    nodes = job.nodes
    if not nodes.engines:
        return ""
    gpus = nodes.gpus_per_engine
    everything = " ".join(map(str, range(nodes.gpus_per_node)))
    return f"""\
# An agent for each engine, started again if it dies. They ignore USR1, and end with the job. Each
# has its own of the GPUs that Slurm gave to the node, or of all where Slurm gives out none.
rm -f "$run"/engines/engine*.json # of an earlier attempt
# shellcheck disable=SC2016
as_engine='trap "" USR1
{OPEN_FILES}IFS=, read -ra gpus <<<"${{CUDA_VISIBLE_DEVICES:-}}"
[ ${{#gpus[@]}} -gt 0 ] || gpus=({everything})
[ ${{#gpus[@]}} -le {gpus} ] || gpus=("${{gpus[@]:SLURM_LOCALID*{gpus}:{gpus}}}")
export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${{gpus[*]}}")
until "$@" --name "engine$SLURM_PROCID"; do
    echo "[megasd $(date +%FT%T)] the agent ended with $?: starting it again"
    sleep 5
done'
srun --job-name=engines --relative={nodes.train} --nodes={nodes.serve} --ntasks={nodes.engines} \\
    --ntasks-per-node={nodes.engines_per_node} --kill-on-bad-exit=0 --wait=0 \\
    --unbuffered --output="${{logs//%/%%}}/engine-%t.log" \\
    {shlex.join(_srun(job, cpus=_cpus_of_an_engine(job)))} \\
    bash -c "$as_engine" megasd {_python(job.site, job)} megasd.rollout.vllm.host \\
    --listen :0 --folder "$run/engines" &
"""


def _doctor(job: SlurmJob) -> str:
    """The preflight, but for its folder."""
    network = job.site.network_gb_per_second
    options = "" if network is None else f" --network {network}"
    return f"{_python(job.site, job)} megasd.cli doctor --preflight{options}"


def _filled(template: str, values: Mapping[str, str]) -> str:
    """At once: what a value holds is never taken for a place to fill."""
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], template)
