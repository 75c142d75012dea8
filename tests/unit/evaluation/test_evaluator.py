"""Held-out evaluation with an engine and a scorer that do as they are told, on one rank."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from megasd.evaluation.config import EvaluationConfig
from megasd.evaluation.evaluate import Counts, Evaluation, evaluate, leakage
from megasd.evaluation.evaluator import Evaluator
from megasd.evaluation.records import read_counts, write_counts
from megasd.rollout.config import RolloutConfig
from megasd.rollout.engine import Request
from megasd.types import Prompt, Rollout, Verdict

PROMPTS = [
    Prompt(index=10 * number, messages=(), token_ids=np.array([number])) for number in range(4)
]

SHORT = RolloutConfig(max_response_tokens=3)


class OneRank:
    """A Spread whose only rank does all the work."""

    def map(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        return work(items)


class Engine:
    """Response s of prompt p has p + s + 1 tokens; longer than the limit it is cut there."""

    requests: Sequence[Request] = ()

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        self.requests = requests
        return [self._rollout(request) for request in requests]

    def _rollout(self, request: Request) -> Rollout:
        length = request.prompt.index // 10 + request.sample + 1
        limit = request.max_response_tokens
        return Rollout(
            prompt=request.prompt,
            group_id=request.group_id,
            sample=request.sample,
            token_ids=np.zeros(min(length, limit), dtype=np.int64),
            logprobs=None,
            text="",
            finish_reason="stop" if length <= limit else "length",
            policy_version=0,
        )


class Scorer:
    """Pays rewards[prompt][sample]; None is a verifier that failed."""

    def __init__(self, rewards: Sequence[Sequence[float | None]]) -> None:
        self.rewards = rewards

    def score(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        rewards = [self.rewards[r.prompt.index // 10][r.sample] for r in rollouts]
        return [Verdict(error="hung") if r is None else Verdict(reward=r) for r in rewards]


def run(
    rewards: Sequence[Sequence[float | None]],
    engine: Engine | None = None,
    rollout: RolloutConfig = SHORT,
    **config: Any,
) -> Evaluation:
    return evaluate(
        cast(Any, Engine() if engine is None else engine),
        cast(Any, Scorer(rewards)),
        PROMPTS,
        EvaluationConfig(samples=len(rewards[0]), **config),
        seed=5,
        rollout=rollout,
        success_threshold=0.5,
        spread=cast(Any, OneRank()),
    )


def test_figures_are_those_counted_by_hand() -> None:
    report, counts = run([[1.0, 0.5], [0.4, 0.0], [0.0, 1.0], [1.0, 0.1]])
    assert report["evaluation/accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert report["evaluation/accuracy_low"] < 0.5 < report["evaluation/accuracy_high"]
    assert report["evaluation/pass_at_2"] == pytest.approx(3 / 4)
    assert report["evaluation/response_length"] == pytest.approx((1 + 2 + 2 + 3 * 5) / 8)
    assert report["evaluation/truncated"] == pytest.approx(3 / 8)
    assert report["evaluation/reward_errors"] == 0
    assert report["evaluation/responses"] == 8
    assert counts == Counts(prompts=[0, 10, 20, 30], right=[2, 0, 1, 1], judged=[2, 2, 2, 2])


def test_a_verifier_that_failed_is_counted_and_neither_right_nor_wrong() -> None:
    report, counts = run([[1.0, None], [0.0, 0.0], [None, None], [1.0, 1.0]])
    assert report["evaluation/accuracy"] == pytest.approx((1 + 0 + 1) / 3)
    assert report["evaluation/pass_at_2"] == pytest.approx(1 / 2)
    assert report["evaluation/reward_errors"] == 3
    assert counts == Counts(prompts=[0, 10, 20, 30], right=[1, 0, 0, 2], judged=[1, 2, 0, 2])


def test_every_response_has_a_seed_of_its_own_that_does_not_depend_on_the_step() -> None:
    first, again = Engine(), Engine()
    for engine in (first, again):
        run([[0.0] * 8] * 4, engine)
    seeds = [request.seed for request in first.requests]
    assert len(set(seeds)) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [request.seed for request in again.requests]


def test_max_prompts_takes_the_first_rows_and_their_responses_stay_the_same() -> None:
    all_of_them, first_two = Engine(), Engine()
    run([[0.0, 1.0]] * 4, all_of_them, temperature=0.7)
    run([[0.0, 1.0]] * 4, first_two, temperature=0.7, max_prompts=2)
    assert list(first_two.requests) == list(all_of_them.requests)[:4]
    assert {request.temperature for request in first_two.requests} == {0.7}


def test_all_but_the_temperature_is_as_in_training() -> None:
    engine = Engine()
    rollout = RolloutConfig(
        temperature=0.9, top_p=0.8, top_k=7, min_p=0.1, stop=["]"], max_response_tokens=3
    )
    run([[0.0, 1.0]] * 4, engine, rollout=rollout, temperature=0.7)
    for one in engine.requests:
        assert (one.temperature, one.top_p, one.top_k, one.min_p) == (0.7, 0.8, 7, 0.1)
        assert (one.stop, one.max_response_tokens) == (("]",), 3)


def test_leakage_is_the_share_of_responses_that_mention_the_reference() -> None:
    texts = [
        "According to the reference, it is 4.",
        "2 + 2 = 4, as the PROVIDED solution says, and according to the reference.",
        "The answer is 4.",
        "A saline solution of 4 %, as reference.",
    ]
    assert leakage(texts, EvaluationConfig()) == 2 / 4
    assert leakage(texts, EvaluationConfig(leakage_patterns=[r"\b4 ?%", "^2"])) == 2 / 4


def test_leakage_is_logged_unless_there_are_no_patterns() -> None:
    rewards = [[1.0, 1.0]] * 4
    assert run(rewards).metrics["evaluation/leakage"] == 0.0
    assert run(rewards, leakage_patterns=["^$"]).metrics["evaluation/leakage"] == 1.0
    assert "evaluation/leakage" not in run(rewards, leakage_patterns=[]).metrics


def test_a_pattern_that_is_none_is_refused_where_it_is_read() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.leakage_patterns: '\(the' is not"):
        EvaluationConfig(leakage_patterns=["fine", "(the"])


def test_the_counts_of_every_evaluation_lie_in_the_run_folder(tmp_path: Path) -> None:
    def evaluator(folder: Path | None, rewards: Sequence[Sequence[float]]) -> Evaluator:
        return Evaluator(
            EvaluationConfig(samples=2),
            PROMPTS,
            engines=cast(Any, Engine()),
            scorer=cast(Any, Scorer(rewards)),
            spread=cast(Any, OneRank()),
            seed=5,
            rollout=SHORT,
            success_threshold=0.5,
            run_folder=folder,
        )

    better = [[1.0, 1.0]] * 4
    evaluator(tmp_path, [[0.0, 1.0]] * 4).evaluate(0)
    evaluator(tmp_path, [[0.0, 0.0]] * 4).evaluate(20)
    evaluator(tmp_path, better).evaluate(20)  # resumed
    metrics = evaluator(None, better).evaluate(30)  # another rank
    assert metrics["evaluation/accuracy"] == 1.0
    assert read_counts(tmp_path, 0).right == [1, 1, 1, 1]
    assert read_counts(tmp_path, 20) == Counts([0, 10, 20, 30], [2, 2, 2, 2], [2, 2, 2, 2])
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_counts_that_cannot_be_written_are_a_warning_and_to_whoever_reads_them_a_sentence(
    tmp_path: Path,
) -> None:
    (tmp_path / "evaluations").write_text("a file, where a folder must be made")
    with pytest.warns(UserWarning, match=r"step_000020\.json cannot be written \("):
        write_counts(tmp_path, 20, Counts([1], [1], [1]))
    with pytest.raises(ValueError, match=r"step_000020\.json: the counts .* cannot be read"):
        read_counts(tmp_path, 20)
