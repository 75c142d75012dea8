"""When a run is stuck, and what is said of it."""

import math
from types import SimpleNamespace
from typing import Any

import torch

from megasd.loop.diagnostics import (
    NotFinite,
    count_not_finite,
    held_here,
    running_counts,
    what_is_not_finite,
)
from megasd.types import ResponseBatch, Support

NAN, INF = math.nan, math.inf


def a_batch(**values: Any) -> ResponseBatch:
    """Three rollouts of 2, 1 and 3 tokens."""
    return ResponseBatch(
        rewards=torch.zeros(3),
        is_correct=torch.zeros(3, dtype=torch.bool),
        group_ids=torch.zeros(3, dtype=torch.int64),
        minibatch_ids=torch.zeros(3, dtype=torch.int64),
        rollout_ids=torch.tensor([0, 0, 1, 2, 2, 2]),
        response_mask=torch.ones(6, dtype=torch.bool),
        max_response_tokens=4,
        **values,
    )


def an_update(loss: float, grad_norm: float, *, skipped: bool = True) -> Any:
    return SimpleNamespace(metrics={"loss": loss, "grad_norm": grad_norm}, skipped=skipped)


def test_an_update_that_is_not_skipped_starts_the_count_anew() -> None:
    assert running_counts(2, ["skipped", "stepped", "skipped", "skipped"]) == [3, 0, 1, 2]


def test_an_update_with_nothing_to_learn_neither_counts_nor_starts_anew() -> None:
    assert running_counts(1, ["empty", "skipped", "empty", "stepped", "empty"]) == [1, 2, 2, 0, 0]
    assert running_counts(2, ["empty"]) == [2]


def test_values_are_counted_with_the_rollouts_they_belong_to() -> None:
    batch = a_batch()
    per_token = torch.tensor([0.0, 1.0, NAN, 2.0, -INF, INF])
    assert count_not_finite(per_token, batch) == NotFinite(3, 6, [1, 2])
    assert count_not_finite(torch.tensor([0.0, INF, 0.0]), batch) == NotFinite(1, 3, [1])
    assert count_not_finite(torch.tensor([0.0, INF]), batch) == NotFinite(1, 2, []), "of none"
    assert count_not_finite(torch.tensor(NAN), batch) == NotFinite(1, 1, [])
    assert count_not_finite(batch.rollout_ids, batch) == NotFinite(0, 6, [])


def test_values_that_a_rank_holds_of_its_own_tokens_are_found_through_their_index() -> None:
    """Rollout 2 is read here; the last row stands for all other tokens."""
    logprobs = torch.tensor([[-1.0, -2.0], [-INF, NAN], [-1.0, -1.0], [0.0, 0.0]])
    support = Support(
        ids=torch.zeros(4, 2, dtype=torch.int64),
        teacher_logprobs=logprobs,
        index=torch.tensor([-1, -1, -1, 0, 1, 2]),
    )
    found = held_here(a_batch(support=support))
    assert found == {"support.teacher_logprobs": NotFinite(2, 8, [2])}
    assert held_here(a_batch()) == {}


def test_causes_are_named_before_effects_and_the_rank_that_made_the_gradients_so() -> None:
    updates = [an_update(0.5, 1.0, skipped=False), an_update(NAN, NAN)]
    shard, own = {"embedding": 4}, {"embedding": 7, "decoder.layers.1.mlp": 9}
    said = what_is_not_finite(
        {"batch.rewards": NotFinite(5, 9, [0, 2, 3, 5, 8]), "x": NotFinite(1, 1, [])},
        updates,
        [[{}, shard], [{}, own], [{}, {}]],
    )
    assert said == [
        "batch.rewards of rollout 0, 2, 3 and 2 more",
        "x",
        "the loss (nan)",
        "gradients of 2 parameters on rank 1, the last decoder.layers.1.mlp, and on 1 more ranks",
    ]


def test_a_loss_or_a_norm_that_alone_is_not_finite_is_told_apart() -> None:
    assert what_is_not_finite({}, [an_update(INF, 1.0)], [[{}]]) == ["the loss (inf)"]
    (said,) = what_is_not_finite({}, [an_update(1e30, INF)], [[{}]])
    assert "each of them finite but too large" in said
