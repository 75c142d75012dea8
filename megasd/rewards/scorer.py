"""Judges rollouts in worker processes that are killed when a verifier hangs."""

import multiprocessing
import os
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import TracebackType
from typing import Any

from pebble import CONSTS, ProcessExpired, ProcessFuture, ProcessPool

from megasd.process import interrupt
from megasd.process.waiting import first_of, waiting_for
from megasd.rewards import worker
from megasd.rewards.config import RewardConfig
from megasd.rewards.verifiers import check_answer_pattern
from megasd.rewards.worker import Judged
from megasd.types import Rollout, Verdict

# Plain string functions: they cannot hang, so a worker would only cost time.
INLINE = ("exact", "choice")
# Workers have SIGTERM blocked, as their rank has (process/interrupt.py): SIGKILL at once.
CONSTS.term_timeout = 0


class Scorer:
    """A context manager around the workers; `score` judges a batch of rollouts.

    Each rollout is a task of its own, with `reward.timeout_seconds` of its own: a verifier that
    raises, hangs or kills its process costs that rollout's verdict and no other. Workers start
    with the first batch that needs them; they end with the thread that called `score` then.
    """

    def __init__(self, config: RewardConfig, answer_pattern: str | None = None) -> None:
        if errors := check_answer_pattern(answer_pattern):
            raise ValueError("\n".join(errors))
        if config.timeout_seconds <= 0:
            raise ValueError(
                f"reward.timeout_seconds must be above 0, not {config.timeout_seconds}."
            )
        if config.workers < 1:
            raise ValueError(f"reward.workers must be at least 1, not {config.workers}.")
        self._config = config
        self._pattern = answer_pattern
        self._pool: ProcessPool | None = None
        self._warm: frozenset[str] = frozenset()  # verifiers that the workers have imported

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def score(self, rollouts: list[Rollout]) -> list[Verdict]:
        """One verdict per rollout, in order."""
        judged: dict[int, Judged] = {}
        tasks: dict[int, tuple[Any, ...]] = {}
        for index, rollout in enumerate(rollouts):
            prompt = rollout.prompt
            task = (prompt.verifier, rollout.text, prompt.answer, prompt.metadata, self._pattern)
            # A pattern is the user's, and a regular expression can take forever.
            if prompt.verifier in INLINE and self._pattern is None:
                judged[index] = worker.judge(*task)
            else:
                tasks[index] = task
        # A pool can break as a whole (workers that die while they start, or while idle): it is
        # replaced once.
        for _ in range(2):
            left = {index: task for index, task in tasks.items() if index not in judged}
            if left:
                judged |= self._judge_in_workers(left, rollouts)
        broken = Judged(0.0, "", "the verifiers' worker processes died while they started")
        return [self._verdict(judged.get(index, broken)) for index in range(len(rollouts))]

    def _judge_in_workers(
        self, tasks: dict[int, tuple[Any, ...]], rollouts: list[Rollout]
    ) -> dict[int, Judged]:
        """What each task gave; those that a broken pool has lost are left out."""
        pool = self._ready_pool({task[0] for task in tasks.values()})
        futures: dict[ProcessFuture[Judged], int] = {}
        try:
            for index, task in tasks.items():
                timeout = self._config.timeout_seconds
                futures[pool.schedule(worker.judge, args=task, timeout=timeout)] = index
        except RuntimeError:  # pebble: the pool broke under us
            self._stop()
        pending = set(futures)

        def unjudged() -> str:
            left = [rollouts[futures[future]] for future in futures if not future.done()]
            return f"verdicts on {first_of([rollout.name for rollout in left])}"

        with waiting_for(unjudged):
            while pending and self._pool is not None:
                interrupt.raise_if_asked()
                _, pending = wait(pending, timeout=1.0)
                if not pool.active:  # tasks that it had not yet sent out would wait forever
                    self._stop()
        return {
            index: judged
            for future, index in futures.items()
            if future.done() and (judged := self._result(future)) is not None
        }

    def _result(self, future: "ProcessFuture[Judged]") -> Judged | None:
        try:
            return future.result()
        except BrokenProcessPool:
            return None
        except TimeoutError:
            seconds = self._config.timeout_seconds
            return Judged(0.0, "", f"the verifier took longer than {seconds:g} s and was killed")
        except ProcessExpired as error:
            return Judged(0.0, "", f"the verifier's process died with exit code {error.exitcode}")
        except Exception as error:  # the row's metadata cannot be sent to another process
            return Judged(0.0, "", f"{type(error).__name__}: {error}")

    def _ready_pool(self, names: set[str]) -> ProcessPool:
        """A working pool whose workers have imported the verifiers in `names`."""
        if self._pool is not None and not (self._pool.active and names <= self._warm):
            self._stop()
        if self._pool is None:
            self._warm |= names
            # Spawned, not forked: the parent has threads, and perhaps a GPU.
            self._pool = ProcessPool(
                max_workers=self._config.workers,
                initializer=worker.start,
                initargs=(os.getpid(), sorted(self._warm)),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _verdict(self, judged: Judged) -> Verdict:
        if judged.error is not None:
            return Verdict(error=judged.error)
        verdict = Verdict(reward=judged.reward, feedback=judged.feedback)
        if not self._config.binary:
            return verdict
        return replace(verdict, reward=float(verdict.is_right(self._config.success_threshold)))
