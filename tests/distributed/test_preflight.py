"""The preflight names the one bad node of a job, on every rank alike."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megasd.testing.ranks import Ranks
from tests.distributed import preflight_cases as cases


def examine(ranks: Ranks, folder: Path, **bad: Any) -> list[str]:
    """What is wrong; the same sentences on every rank."""
    found = ranks.run(_examine, str(folder), {"bad_rank": 2, **bad}, world_size=4)
    assert all(one == found[0] for one in found)
    return [finding.sentence for finding in found[0] if finding.level == "wrong"]


def _examine(folder: str, bad: dict[str, Any]) -> Any:
    return cases.examine(folder, **bad)


def test_a_good_job_has_nothing_wrong_and_leaves_no_trace(ranks: Ranks, tmp_path: Path) -> None:
    assert examine(ranks, tmp_path / "runs") == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_something_is_stays(ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert examine(ranks, run, leaves="config.yaml") == []
    assert examine(ranks, run) == []
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (
            {"versions": {"torch": "2.10.0"}},
            "node node2 (rank 2): torch 2.10.0, elsewhere 2.11.0",
        ),
        (
            {"gpu": dataclasses.replace(cases.GOOD, driver="570.2")},
            "node node2 (rank 2): driver 570.2, 580.1, elsewhere 580.1",
        ),
        (
            {"gpu": dataclasses.replace(cases.GOOD, ecc_errors=4)},
            "node node2: GPU 7: 4 uncorrected ECC errors since the driver was loaded; take the "
            "GPU out of service",
        ),
        (
            {"gpu": dataclasses.replace(cases.GOOD, memory_used=40960)},
            "node node2: GPU 7: 40.0 GiB are in use by other programs; end them",
        ),
        (
            {"slow": 0.1},
            "node node2: all-reduce to other nodes at 4.50 GB/s, expected is 20.00; take the node "
            "out of the job",
        ),
        (
            {"slow": 0.0},
            "node node2: all-reduce to other nodes fails or hangs; take the node out of the job",
        ),
    ],
    ids=["version", "driver", "ecc", "memory", "slow link", "broken link"],
)
def test_the_bad_node_is_named_and_no_other(
    bad: dict[str, Any], sentence: str, ranks: Ranks, tmp_path: Path
) -> None:
    assert examine(ranks, tmp_path, **bad) == [sentence]


def test_a_node_that_sees_another_folder_is_named(ranks: Ranks, tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "local"
    (said,) = examine(ranks, shared, bad_folder=str(other))
    assert said == (
        f"node node2 (rank 2): {other} is not the folder that rank 0 sees; mount the shared one"
    )


def test_a_slow_gpu_within_a_node_is_found_beside_its_links(ranks: Ranks, tmp_path: Path) -> None:
    """Of two nodes alone nobody can say whose link it is: both are named there."""
    said = examine(ranks, tmp_path, slow=0.1, ranks_per_node=2, bad_rank=2)
    assert [sentence.split(" GB/s")[0] for sentence in said] == [
        "node node1: all-reduce within the node at 30.00",
        "node node0: all-reduce to other nodes at 4.50",
        "node node1: all-reduce to other nodes at 4.50",
    ]
