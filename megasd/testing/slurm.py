"""A real Slurm on one machine, for tests: munged, slurmctld, and a slurmd for each virtual node.

No systemd, no accounting, no cgroups; it needs root and the packages that tools/install_slurm.sh
installs. The daemons are children of this process, in a folder of their own, on free ports.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Variables of a job: tests may themselves run inside one.
OF_A_JOB = ("SLURM_", "SRUN_", "SBATCH_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")

# cred_expire: Slurm holds a requeued job back for as long, and 5 is the least. config_overrides:
# believe this file, not the hardware. ReturnToService: a node that is down stays so. The fake GPUs
# are terminals: any devices make CUDA_VISIBLE_DEVICES appear.
CONFIG = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=0
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=5
KillWait=2
UnkillableStepTimeout=10
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 Sockets=1 "
    "CoresPerSocket=16 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN\n"
)
# Jobs of `urgent` take the nodes of others, who have a minute to leave.
PARTITIONS = """\
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str | None:
    """Why no cluster can be started here; None: it can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed: run tools/install_slurm.sh"
    return None if os.geteuid() == 0 else "a virtual Slurm is started as root"


class VirtualSlurm:
    """`with VirtualSlurm(folder) as slurm:` nodes n1, n2, ... with fake GPUs, until the end."""

    def __init__(self, folder: Path, *, nodes: int = 2, gpus: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.gpus = gpus
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_JOB)}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "VirtualSlurm":
        try:
            self._write_config()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in self.nodes:
                self._start(node, "slurmd", "-D", "-N", node)
            self.until(self._is_up, "idle nodes", 20)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def run(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def states(self) -> Mapping[str, str]:
        """Of the nodes."""
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).splitlines()
        return dict(line.split() for line in lines)

    def job(self, job: str) -> Mapping[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, ..."""
        said = self.run("scontrol", "show", "job", job, "--oneliner")
        return dict(item.split("=", 1) for item in said.split() if "=" in item)

    def wait(self, job: str, *states: str, timeout: float = 60) -> Mapping[str, str]:
        """Until the job is in one of the states, by default in one that is an end."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.job(job)["JobState"] in wanted, f"{job} to be {wanted}", timeout)
        return self.job(job)

    def until(self, is_true: Callable[[], object], what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not is_true():
            if time.monotonic() > deadline:
                queue = self.run("squeue", "--all", check=False)
                raise TimeoutError(f"waited {timeout:.0f} s for {what}; queue:\n{queue}")
            time.sleep(0.1)

    def fail_node(self, node: str) -> None:
        """Slurm takes the node for dead; its jobs are ended and, if they may be, requeued."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def revive_node(self, node: str) -> None:
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _is_up(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                said = (self.folder / "log" / f"{name}.out").read_text()
                raise RuntimeError(f"{name} ended with {daemon.returncode}: {said[-2000:]}")
        return set(self.states().values()) == {"idle"}

    def _write_config(self) -> None:
        for name in ("state", "log", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(1 + len(self.nodes))
        config = CONFIG.format(host=host, port=port, folder=self.folder)
        gpus = ""
        for name, own in zip(self.nodes, ports, strict=True):
            config += NODE.format(name=name, host=host, port=own, gpus=self.gpus)
            gpus += f"NodeName={name} Name=gpu File=/dev/tty[0-{self.gpus - 1}]\n"
        (self.folder / "slurm.conf").write_text(config + PARTITIONS)
        (self.folder / "gres.conf").write_text(gpus)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{name}={folder}/{name}" for name in ("socket", "pid-file", "log-file")]
        files += [f"--key-file={key}", f"--seed-file={folder}/seed"]
        # Forced, for it warns of folders that not everybody may enter: here all users are root.
        self._start("munged", "munged", "--foreground", "--force", *files)
        self.until((folder / "socket").exists, "munge", 10)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _stop(self) -> None:
        controller = self._daemons.get("slurmctld")
        if controller is not None and controller.poll() is None:
            with contextlib.suppress(Exception):
                self.run("scancel", "--user=root")
                self.until(lambda: not self.run("squeue", "-h"), "an empty queue", 15)
        for name in (*self.nodes, "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is None:
                continue
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    """Held all at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
