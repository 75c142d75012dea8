import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megasd.testing.slurm import OF_A_JOB, VirtualSlurm, missing

INSTALL = Path(__file__).parents[2] / "tools" / "install_slurm.sh"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    """Three nodes of two GPUs; installs Slurm where that is possible."""
    if missing() is not None:
        installed = subprocess.run(["bash", INSTALL], capture_output=True, text=True)
        reason = missing()
        if reason is not None and "CI" not in os.environ:
            pytest.skip(f"no Slurm: {installed.stderr.strip() or reason}")
        assert reason is None, f"{reason}: {installed.stderr}"
    with VirtualSlurm(tmp_path_factory.mktemp("slurm"), nodes=3, gpus=2) as slurm:
        yield slurm


@pytest.fixture
def slurm(cluster: VirtualSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualSlurm]:
    """The cluster, empty, with all nodes, as `megasd submit` of this process sees it."""
    for name in [name for name in os.environ if name.startswith(OF_A_JOB)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.run("scancel", "--user=root")
    cluster.until(lambda: not cluster.run("squeue", "-h"), "an empty queue")
    for node, state in cluster.states().items():
        if "down" in state:
            cluster.revive_node(node)
    cluster.until(lambda: set(cluster.states().values()) == {"idle"}, "idle nodes")
