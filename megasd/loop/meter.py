"""How far float8 moves what the policy says: the same tokens scored with it and without."""

from typing import TYPE_CHECKING

import numpy as np

from megasd.loop.experience import Experience
from megasd.losses.mismatch import precision_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megasd.policy.policy import Policy


class Meter:
    """Every `model.fp8.meter_every` steps, on some rollouts of the batch: two forward passes."""

    def __init__(self, policy: "Policy", *, seed: int) -> None:
        self._policy = policy
        self._seed = seed

    def measure(self, experience: Experience, step: int) -> dict[str, float]:
        """fp8/... where the step is one that measures. Called by every rank."""
        state = self._policy.state
        if state.fp8 is None or not state.fp8.meter_every or step % state.fp8.meter_every:
            return {}
        views = experience.student_views
        chosen = sample(
            [view.num_tokens for view in views],
            max_tokens=state.max_tokens_per_microbatch * state.layout.dp_size,
            seed=(self._seed, step),
        )
        read = [views[i] for i in chosen]
        offsets = np.cumsum([0, *(len(view.response_ids) for view in read)])
        measured = precision_metrics(*self._policy.score_in_both(read, offsets))
        return {f"fp8/{name}": value for name, value in measured.items()}


def sample(lengths: "Sequence[int]", *, max_tokens: int, seed: tuple[int, ...]) -> list[int]:
    """Sequences drawn at random, as many as have `max_tokens` in all, but one at least."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    read = np.cumsum(np.asarray(lengths)[order])
    return sorted(order[: max(1, int((read <= max_tokens).sum()))].tolist())
