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


# What takes minutes starts first, and unit tests fill up.
_LONGEST = ("tests/distributed/", "tests/slurm/", "tests/end_to_end/test_resume.py")
_LONGEST += (
    "tests/te_stub/",
    "tests/rollout/test_vllm_sync.py",
    "tests/rollout/",
    "tests/end_to_end/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        matches = (i for i, path in enumerate(_LONGEST) if item.nodeid.startswith(path))
        return next(matches, len(_LONGEST))

    items.sort(key=place)  # stable: in a file, and among the rest, the order stays


class _Scheduling(LoadFileScheduling):
    """To each process of `--numprocesses` a file at a time; a folder where files share a fixture.

    In the order of collection, with `--no-loadscope-reorder`.
    """

    def _split_scope(self, nodeid: str) -> str:
        shared = ("tests/distributed/", "tests/slurm/", "tests/te_stub/")  # processes, a cluster
        return next(filter(nodeid.startswith, shared), super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _Scheduling(config, log)
