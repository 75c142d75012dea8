"""The arithmetic of a comparison's table, on run folders written by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasd.compare.results import Results, collect, difference, estimate, to_json
from megasd.compare.runs import Comparison, Run
from megasd.compare.table import as_text
from megasd.configuration.compare import CompareConfig
from megasd.configuration.load import Config, RunConfig
from megasd.evaluation.config import EvaluationConfig
from megasd.evaluation.evaluate import Counts
from megasd.evaluation.records import write_counts
from megasd.evaluation.statistics import bootstrap_over_seeds
from megasd.metrics.records import METRICS_FILE

STEPS = 20


def comparison(folder: Path, names: Sequence[str], *, seeds: int, threshold: float) -> Comparison:
    config = Config(
        evaluation=EvaluationConfig(files=["held_out.jsonl"], every=10),
        compare=CompareConfig(threshold=threshold),
    )
    runs = [
        Run(
            config=replace(
                config,
                algorithm_name=name,
                run=RunConfig(f"{name}-seed{seed}", str(folder), STEPS, seed),
            ),
        )
        for name in names
        for seed in range(seeds)
    ]
    return Comparison(
        path="config.yaml",
        overrides=(),
        launcher=(),
        folder=folder,
        warm_start=None,
        runs=tuple(runs),
        overruled={name: {} for name in names},
    )


def write_run(
    folder: Path, right: Sequence[int], judged: Sequence[int], accuracies: Mapping[int, float]
) -> None:
    """A run whose entropy is its step, that took 3 s per step with 1 s of evaluation in it."""
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"step": step, "update/entropy": step, "time/step": 3.0, "time/evaluation": 1.0}
        for step in range(STEPS)
    ]
    rows.append({"step": STEPS, "evaluation/response_length": 7.0, "evaluation/leakage": 0.25})
    for step, accuracy in accuracies.items():
        rows[step]["evaluation/accuracy"] = accuracy
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_counts(folder, STEPS, Counts(list(range(len(right))), list(right), list(judged)))


@pytest.fixture
def results(tmp_path: Path) -> tuple[Comparison, Results]:
    """Three methods on two seeds and four prompts; the second seed of `c` has failed."""
    write_run(tmp_path / "a-seed0", [4, 2, 0, 2], [4, 4, 4, 4], {0: 0.1, 10: 0.4, 20: 0.5})
    write_run(tmp_path / "a-seed1", [4, 2, 0, 2], [4, 4, 4, 4], {0: 0.1, 10: 0.6, 20: 0.5})
    write_run(tmp_path / "b-seed0", [4, 4, 4, 3], [4, 4, 4, 3], {0: 0.1, 10: 0.5, 20: 1.0})
    write_run(tmp_path / "b-seed1", [4, 4, 0, 0], [4, 4, 4, 0], {0: 0.1, 10: 0.6, 20: 0.7})
    write_run(tmp_path / "c-seed0", [0, 0, 0, 0], [4, 4, 4, 4], {0: 0.1, 10: 0.2, 20: 0.0})
    asked = comparison(tmp_path, ["a", "b", "c"], seeds=2, threshold=0.5)
    return asked, collect(asked, {tmp_path / "c-seed1": "exit code 2, no room"})


def test_the_figures_are_those_counted_by_hand(results: tuple[Comparison, Results]) -> None:
    a, b, c = results[1].algorithms
    assert a.accuracy.mean == pytest.approx(0.5)
    # The fourth prompt goes: the second seed could not judge it.
    assert b.accuracy.mean == pytest.approx((3 + 2) / 6)
    assert a.steps_to_threshold == 15  # 20 and 10
    assert b.steps_to_threshold == 10
    assert math.isinf(c.steps_to_threshold)
    assert a.response_length == 7
    assert a.entropy == pytest.approx(18.5)  # of steps 18 and 19
    assert a.leakage == 0.25
    assert a.seconds == pytest.approx(20 * 2)


def test_differences_are_of_the_same_prompts_and_the_same_seeds(
    results: tuple[Comparison, Results],
) -> None:
    a, b, c = (one.difference for one in results[1].algorithms)
    assert a is None
    assert b is not None
    assert b.mean == pytest.approx((0 + 0.5 + 1 + 0 + 0.5 + 0) / 6)
    assert c is not None
    assert c.mean == pytest.approx(-0.5)  # over the one seed that both have


def test_a_difference_that_the_spread_of_prompts_and_seeds_explains_is_noise() -> None:
    generator = np.random.default_rng(0)
    base = {seed: generator.random(200) for seed in range(3)}
    shifted = {seed: values + 0.02 for seed, values in base.items()}
    clear = difference(shifted, base, "base")
    assert clear is not None
    assert not clear.is_noise
    assert clear.mean == pytest.approx(0.02)
    # The same mean difference, but every seed says something else.
    disagree = {seed: base[seed] + 0.02 + 0.2 * (seed - 1) for seed in base}
    unclear = difference(disagree, base, "base")
    assert unclear is not None
    assert unclear.mean == pytest.approx(0.02)
    assert unclear.is_noise


def test_the_interval_of_seeds_and_prompts_covers_nineteen_times_in_twenty() -> None:
    """Effects of seeds and of prompts are drawn anew each time; 4 seeds, 60 prompts."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        seeds = generator.normal(0, 0.05, size=(4, 1))
        prompts = generator.normal(0, 0.3, size=(1, 60))
        values = 0.5 + seeds + prompts + generator.normal(0, 0.1, size=(4, 60))
        _, low, high = bootstrap_over_seeds(values, seed=trial, resamples=400)
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_of_one_seed_the_interval_is_over_prompts_and_of_none_there_is_none() -> None:
    values = np.random.default_rng(2).random(50)
    mean, low, high = estimate([values])
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(50), rel=0.1)
    assert math.isnan(estimate([]).mean)


def test_the_table_says_what_failed_and_what_is_noise(results: tuple[Comparison, Results]) -> None:
    text = as_text(*results)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert rows["c"].split("|")[3].strip() == "-"  # never reached
    assert rows["a"].split("|")[3].strip() == "15"
    assert "within noise" not in rows["c"]
    assert "Below a: c." in text
    assert "- c seed 1: exit code 2, no room" in text
    assert "accuracy before training 0.100" in text


def test_the_json_holds_the_table_and_no_number_that_is_none(
    results: tuple[Comparison, Results],
) -> None:
    record = json.loads(json.dumps(to_json(results[1]), allow_nan=False))
    _, _, c = record["algorithms"]
    assert c["accuracy"]["mean"] == 0.0
    assert c["steps_to_threshold"] is None
    assert c["difference"]["within_noise"] is False
    assert c["failures"] == {"1": "exit code 2, no room"}
    assert [run["seed"] for run in c["runs"]] == [0]
