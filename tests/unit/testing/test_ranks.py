"""The process groups of a case end with it, and a case that keeps one is told."""

import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megasd.testing import ranks

KEPT: list[Any] = []


def makes_a_group() -> int:
    group: Any = dist.new_group()
    dist.barrier(group)
    return ranks.gloo_threads()


def keeps_a_group() -> None:
    KEPT.append(dist.new_group())


def keeps_a_group_and_raises() -> None:
    keeps_a_group()
    raise ValueError("for another reason")


@pytest.fixture
def answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[bool, Any, bool]]]:
    """What the only rank answers; it is a thread of this process."""
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    ours, theirs = Pipe()
    rank = threading.Thread(target=ranks._serve, args=(0, theirs))
    rank.start()

    def answer(case: Callable[[], Any]) -> tuple[bool, Any, bool]:
        ours.send((case, (), 1, str(tmp_path / case.__name__)))
        return ours.recv()

    yield answer
    ours.close()
    rank.join()
    KEPT.clear()


def test_a_case_that_leaves_a_process_group_behind_is_told(
    answers: Callable[..., tuple[bool, Any, bool]],
) -> None:
    ok, threads, fit = answers(makes_a_group)
    assert (ok, fit) == (True, True)
    assert threads >= 2, "of the world, and of its own"
    ok, said, fit = answers(keeps_a_group)
    assert (ok, fit) == (False, False)
    assert said.startswith("the case left ")
    KEPT.clear()
    ok, said, fit = answers(keeps_a_group_and_raises)
    assert (ok, fit) == (False, False)
    assert "for another reason" in said
