from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from megasd.testing.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo ranks, spawned once for the whole session."""
    group = Ranks(size=4)
    yield group
    group.close()


class _Scheduling(LoadFileScheduling):
    """To each process of `--numprocesses` a file at a time; a folder where files share a fixture.

    With `--no-loadscope-reorder` what takes minutes starts first, and unit tests fill up.
    """

    def _split_scope(self, nodeid: str) -> str:
        shared = ("tests/distributed/", "tests/slurm/")  # the ranks, the cluster
        return next(filter(nodeid.startswith, shared), super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _Scheduling(config, log)
