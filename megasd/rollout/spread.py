"""A list of work, cut over the ranks that do it, and its results in order on every rank."""

import itertools
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from megasd.process import together
from megasd.process.interrupt import StopError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Spread:
    """`map` is called by all ranks with the same items; workers take contiguous shares.

    `worker` is this rank's place among the `num_workers` that work (None: it only receives). What
    one worker raises is raised on every rank, naming the rank: nobody is left waiting.
    """

    def __init__(self, worker: int | None, num_workers: int) -> None:
        assert worker is None or 0 <= worker < num_workers
        self.worker = worker
        self.num_workers = num_workers

    def map(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result]:
        results: Sequence[Result] = []
        failure, is_stopped = None, False
        if self.worker is not None:
            start, end = (
                len(items) * w // self.num_workers for w in (self.worker, self.worker + 1)
            )
            try:
                results = work(items[start:end])
                assert len(results) == end - start, "one result per item"
            except StopError:
                is_stopped = True
            except Exception:
                failure = traceback.format_exc()
        everywhere = together.from_every_rank((self.worker, failure, is_stopped))
        for rank, (_, one_failure, _) in enumerate(everywhere):
            if one_failure is not None:
                raise RuntimeError(f"rank {rank} failed:\n{one_failure}")
        if any(one_stopped for _, _, one_stopped in everywhere):
            raise StopError
        working = {w: rank for rank, (w, _, _) in enumerate(everywhere) if w is not None}
        parts = together.from_speakers(list(results), [working[w] for w in sorted(working)])
        return list(itertools.chain.from_iterable(parts))
