"""Whether an engine computes what the trainer computes, on sequences that are always the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megasd.types import Prompt

MAX_SEQUENCES, MAX_TOKENS = 16, 256


def probe_sequences(prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """The first prompts of the dataset, cut to a length that costs nothing."""
    usable = [prompt.token_ids[:MAX_TOKENS] for prompt in prompts if len(prompt.token_ids) > 1]
    return usable[:MAX_SEQUENCES]


@dataclass(frozen=True, slots=True)
class Gap:
    """|engine - trainer| of log-probs: its mean over all tokens, and the worst of them in words."""

    mean: float
    worst: str


def gap(
    sequences: Sequence[np.ndarray],
    engine: Sequence[np.ndarray],
    trainer: Sequence[np.ndarray],
    *,
    show: int = 5,
) -> Gap:
    """Compares log-probs [T - 1] of each [T] sequence; what is not finite is infinitely wrong."""
    where = [(s, t) for s, ids in enumerate(sequences) for t in range(1, len(ids))]
    ours, theirs = np.concatenate(list(trainer)), np.concatenate(list(engine))
    distance = np.abs(theirs.astype(np.float64) - ours)
    distance[~np.isfinite(distance)] = np.inf
    worst = np.argsort(-distance, kind="stable")[:show]
    lines = [
        f"token {sequences[s][t]} (place {t} of probe {s}): engine {theirs[i]:.4f}, "
        f"trainer {ours[i]:.4f}"
        for i in worst.tolist()
        for s, t in (where[i],)
    ]
    return Gap(float(distance.mean()), "; ".join(lines))
