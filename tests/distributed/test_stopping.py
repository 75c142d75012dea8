"""All ranks stop together, whichever of them was asked to."""

import pytest

from megasd.testing.ranks import Ranks
from tests.distributed import stopping_cases as cases


@pytest.mark.parametrize(("asked", "working"), [(0, 0), (1, 0)])
def test_a_signal_to_one_rank_ends_the_work_that_all_wait_for(
    asked: int, working: int, ranks: Ranks
) -> None:
    assert ranks.run(cases.stop_one, asked, working, world_size=3) == ["SIGTERM"] * 3
