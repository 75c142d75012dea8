"""What the runs of a comparison came to, from their folders. Plain numbers, no text.

An interval counts held-out prompts and seeds as chance (`statistics.bootstrap_over_seeds`); that of
a difference is of the same prompts and the same seeds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megasd.compare.runs import Comparison, Run
from megasd.evaluation.records import read_counts
from megasd.evaluation.statistics import Estimate, bootstrap_over_seeds
from megasd.metrics.records import METRICS_FILE, read_rows

AT_THE_END = 0.1  # share of the steps that the entropy is averaged over


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run that got to its end."""

    seed: int
    folder: str
    accuracy_before: float
    accuracy: float
    steps_to_threshold: float  # infinity: never; as fine as evaluation.every
    response_length: float  # of held-out responses at the end, tokens
    entropy: float  # nats per token that it learnt from, over the last tenth of the steps
    leakage: float | None  # of held-out responses at the end; None: no patterns
    seconds: float  # of the steps, evaluation and start-up left out


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Held-out accuracy less that of the first algorithm, over the seeds that both have."""

    against: str
    mean: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """True unless the whole interval lies on one side of 0."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class AlgorithmResult:
    """Means over the seeds that got to their end; steps are their median."""

    name: str
    accuracy: Estimate
    steps_to_threshold: float
    response_length: float
    entropy: float
    leakage: float | None
    seconds: float
    difference: Difference | None  # None: the first algorithm itself, or no seed in common
    runs: list[RunResult]
    failures: dict[int, str]  # by seed


@dataclass(frozen=True, kw_only=True)
class Results:
    num_prompts: int
    algorithms: list[AlgorithmResult]


def collect(comparison: Comparison, failures: Mapping[Path, str]) -> Results:
    """Reads every run that is not among `failures`."""
    by_name: dict[str, list[Run]] = {}
    for run in comparison.runs:
        by_name.setdefault(run.algorithm, []).append(run)
    shares = {run.folder: _shares(run) for run in comparison.runs if run.folder not in failures}
    first = comparison.runs[0].algorithm
    algorithms: list[AlgorithmResult] = []
    for name, runs in by_name.items():
        done = {run.seed: shares[run.folder] for run in runs if run.folder in shares}
        rivals = {r.seed: shares[r.folder] for r in by_name[first] if r.folder in shares}
        algorithms.append(
            _summary(
                name,
                [
                    _read(run, comparison.config.compare.threshold)
                    for run in runs
                    if run.seed in done
                ],
                estimate(list(done.values())),
                None if name == first else difference(done, rivals, first),
                {run.seed: failures[run.folder] for run in runs if run.folder in failures},
            )
        )
    num_prompts = max((len(share) for share in shares.values()), default=0)
    return Results(num_prompts=num_prompts, algorithms=algorithms)


def estimate(shares: Sequence[np.ndarray]) -> Estimate:
    """Mean and interval of one row per seed; prompts that some seed could not judge (NaN) go."""
    values = np.stack(shares) if shares else np.empty((0, 0))
    return bootstrap_over_seeds(values[:, ~np.isnan(values).any(axis=0)], seed=0)


def difference(
    one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray], name: str
) -> Difference | None:
    """`one` less `other`, which is called `name`: shares of right responses by seed, by prompt."""
    if not (seeds := sorted(one.keys() & other.keys())):
        return None
    mean, low, high = estimate([one[seed] - other[seed] for seed in seeds])
    return Difference(against=name, mean=mean, low=low, high=high)


def _shares(run: Run) -> np.ndarray:
    """The share of right responses of each held-out prompt at the end; NaN: none was judged."""
    counts = read_counts(run.folder, run.config.run.steps)
    right, judged = np.array(counts.right, dtype=float), np.array(counts.judged, dtype=float)
    return np.divide(right, judged, out=np.full(len(judged), np.nan), where=judged > 0)


def _read(run: Run, threshold: float) -> RunResult:
    rows = read_rows(run.folder / METRICS_FILE)
    steps = run.config.run.steps
    evaluated = [row for row in rows if row.get("evaluation/accuracy") is not None]
    reached = (row["step"] for row in evaluated if row["evaluation/accuracy"] >= threshold)
    late = [row for row in rows if row["step"] >= steps - max(1, round(AT_THE_END * steps))]
    last = rows[-1]
    return RunResult(
        seed=run.seed,
        folder=str(run.folder),
        accuracy_before=_number(rows[0].get("evaluation/accuracy")),
        accuracy=_number(last.get("evaluation/accuracy")),
        steps_to_threshold=next(reached, math.inf),
        response_length=_number(last.get("evaluation/response_length")),
        entropy=_mean([row.get("update/entropy") for row in late]),
        leakage=last.get("evaluation/leakage"),
        seconds=sum(row.get("time/step", 0.0) - row.get("time/evaluation", 0.0) for row in rows),
    )


def _summary(
    name: str,
    runs: list[RunResult],
    accuracy: Estimate,
    against: Difference | None,
    failures: dict[int, str],
) -> AlgorithmResult:
    leaked = [run.leakage for run in runs if run.leakage is not None]
    return AlgorithmResult(
        name=name,
        accuracy=accuracy,
        # Not np.median: between two infinities it finds no number.
        steps_to_threshold=_median([run.steps_to_threshold for run in runs]),
        response_length=_mean([run.response_length for run in runs]),
        entropy=_mean([run.entropy for run in runs]),
        leakage=_mean(leaked) if leaked else None,
        seconds=_mean([run.seconds for run in runs]),
        difference=against,
        runs=runs,
        failures=failures,
    )


def to_json(results: Results) -> dict[str, Any]:
    """Plain values; what is no finite number is null."""
    values = dataclasses.asdict(results)
    for algorithm, found in zip(values["algorithms"], results.algorithms, strict=True):
        algorithm["accuracy"] = found.accuracy._asdict()
        if found.difference is not None:
            algorithm["difference"]["within_noise"] = found.difference.is_noise
    return _finite(values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return sum(middle) / len(middle) if middle else math.nan
