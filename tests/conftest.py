from collections.abc import Iterator

import pytest

from megasd.testing.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo ranks, spawned once for the whole session."""
    group = Ranks(size=4)
    yield group
    group.close()
