from collections.abc import Iterator

import pytest

from tests.rollout.nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where engines that need no start of their own are forked from."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery.path
    nursery.close()
