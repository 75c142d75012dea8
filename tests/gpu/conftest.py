"""All tests of a GPU may run in one process: it joins its world once."""

from typing import Any

import pytest

from tests.gpu.alone import join_alone


@pytest.fixture
def one_rank() -> Any:
    """The backend of a process without others, and without the policy of the test before."""
    return join_alone("cuda")
