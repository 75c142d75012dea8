"""avg@k on held-out prompts: sample, judge, count."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megasd.evaluation.config import EvaluationConfig
from megasd.evaluation.statistics import average_at_k, pass_at_k
from megasd.rewards.scorer import Scorer
from megasd.rollout.config import RolloutConfig
from megasd.rollout.engine import Request
from megasd.rollout.fleet import Fleet
from megasd.rollout.spread import Spread
from megasd.types import Prompt, Rollout, Verdict


class Counts(NamedTuple):
    """Held-out responses of each prompt, by its place in the files."""

    prompts: list[int]  # row numbers
    right: list[int]
    judged: list[int]  # those whose verifier did not fail


class Evaluation(NamedTuple):
    """What the weights are worth: figures to log, and what they were counted from."""

    metrics: dict[str, float]
    counts: Counts


def evaluate(
    engines: Fleet,
    scorer: Scorer | None,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    *,
    seed: int,
    rollout: RolloutConfig,
    success_threshold: float,
    spread: Spread,
) -> Evaluation:
    """Held-out figures of the weights that the engines hold, the same on every rank.

    Called by all ranks; the scorer is None on those that do not judge. Samples as in training but
    for the temperature, with seeds that do not depend on the step, so that two evaluations differ
    by their weights only. A response is right when its reward reaches
    `success_threshold`; one whose verifier failed is counted in `evaluation/reward_errors` and
    left out of the accuracy.
    """
    requests = [
        Request(
            prompt=prompt,
            group_id=place,
            sample=sample,
            seed=_request_seed(seed, prompt.index, sample),
            temperature=config.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            stop=tuple(rollout.stop),
            max_response_tokens=rollout.max_response_tokens,
        )
        for place, prompt in enumerate(prompts[: config.max_prompts])
        for sample in range(config.samples)
    ]

    def judge(share: Sequence[Rollout]) -> list[Verdict]:
        assert scorer is not None
        return scorer.score(list(share))

    rollouts = engines.generate(requests)
    judged = list(zip(rollouts, spread.map(rollouts, judge), strict=True))
    return summarise(judged, config, seed=seed, success_threshold=success_threshold)


def summarise(
    judged: Sequence[tuple[Rollout, Verdict]],
    config: EvaluationConfig,
    *,
    seed: int,
    success_threshold: float,
) -> Evaluation:
    """The figures of judged responses; rollouts of one prompt share their group_id, from 0."""
    samples = config.samples
    groups = np.array([rollout.group_id for rollout, _ in judged], dtype=np.int64)
    is_judged = np.array([verdict.error is None for _, verdict in judged])
    is_right = np.array([verdict.is_right(success_threshold) for _, verdict in judged])
    right = np.bincount(groups, weights=is_right).astype(np.int64).tolist()
    counted = np.bincount(groups, weights=is_judged).astype(np.int64).tolist()
    accuracy = average_at_k(right, counted, seed=seed)
    metrics = {
        "evaluation/accuracy": accuracy.mean,
        "evaluation/accuracy_low": accuracy.low,
        "evaluation/accuracy_high": accuracy.high,
        f"evaluation/pass_at_{samples}": pass_at_k(right, counted, samples, seed=seed).mean,
        "evaluation/response_length": float(np.mean([len(r.token_ids) for r, _ in judged])),
        "evaluation/truncated": float(np.mean([r.finish_reason == "length" for r, _ in judged])),
        "evaluation/reward_errors": float((~is_judged).sum()),
        "evaluation/responses": float(len(judged)),
    }
    if config.leakage_patterns:
        metrics["evaluation/leakage"] = leakage([r.text for r, _ in judged], config)
    prompts = {rollout.group_id: rollout.prompt.index for rollout, _ in judged}
    return Evaluation(metrics, Counts([prompts[i] for i in range(len(right))], right, counted))


def leakage(texts: Sequence[str], config: EvaluationConfig) -> float:
    """The share of responses that mention what only the teacher may have read."""
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in config.leakage_patterns]
    return float(np.mean([any(pattern.search(text) for pattern in patterns) for text in texts]))


def _request_seed(seed: int, prompt: int, sample: int) -> int:
    """A stream of its own for each response, apart from those of training."""
    sequence = np.random.SeedSequence([seed, prompt, sample], spawn_key=(1,))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
