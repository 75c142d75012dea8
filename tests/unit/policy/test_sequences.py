"""Packing: nothing lost, nothing doubled, every rank agrees, and the shift is right."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from megasd.policy.sequences import assign_owners, balance, pack
from megasd.types import View

RANDOM = np.random.default_rng(0)


def a_view(prompt: int, response: int) -> View:
    ids = RANDOM.integers(0, 1000, prompt + response, dtype=np.int32)  # as rollouts travel
    return View(prompt_ids=ids[:prompt], response_ids=ids[prompt:])


def offsets_of(views: list[View]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(view.response_ids) for view in views])])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_balance_places_each_sequence_once_within_the_budget_and_evenly(num_ranks: int) -> None:
    lengths = RANDOM.integers(1, 100, 200).tolist()
    dealt = balance(lengths, max_tokens=256, num_ranks=num_ranks)

    assert sorted(i for rank in dealt for part in rank for i in part) == list(range(200))
    assert all(sum(lengths[i] for i in part) <= 256 for rank in dealt for part in rank)
    assert len({len(rank) for rank in dealt}) == 1, "ranks must run as many micro-batches"
    loads = [sum(lengths[i] for part in rank for i in part) for rank in dealt]
    assert max(loads) - min(loads) <= 100, "no rank waits for more than one sequence"


def test_fewer_sequences_than_ranks_leave_empty_micro_batches_that_still_run() -> None:
    views = [a_view(3, 2)]
    batches = [
        pack(
            views,
            offsets_of(views),
            torch.ones(2, dtype=torch.bool),
            max_tokens=8,
            rank=rank,
            num_ranks=3,
        )
        for rank in range(3)
    ]
    assert [len(one) for one in batches] == [1, 1, 1]
    assert sorted(len(one[0].tokens) for one in batches) == [0, 0, 2]
    assert all(len(one[0].token_ids) >= 1 for one in batches)


def test_a_sequence_over_the_budget_is_refused_with_the_keys_that_mend_it() -> None:
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch: 10 .* 11 tokens"):
        balance([4, 11], max_tokens=10, num_ranks=1)


@pytest.mark.parametrize("one_length", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
def test_each_kept_token_is_read_once_off_the_row_before_it(
    multiple: int, one_length: bool
) -> None:
    views: list[View | None] = [a_view(int(p), int(r)) for p, r in RANDOM.integers(1, 12, (30, 2))]
    offsets = offsets_of([view for view in views if view is not None])
    views[3] = None  # nothing is read of this rollout
    keep = torch.from_numpy(RANDOM.random(int(offsets[-1])) < 0.7)
    read: dict[int, int] = {}
    for rank in range(2):
        batches = pack(
            views,
            offsets,
            keep,
            max_tokens=40,
            rank=rank,
            num_ranks=2,
            multiple=multiple,
            one_length=one_length,
        )
        assert (len({len(batch.token_ids) for batch in batches}) == 1) == one_length
        for batch in batches:
            assert len(batch.token_ids) % multiple == 0
            assert batch.token_ids.dtype == batch.targets.dtype == torch.int64, "they are indices"
            assert batch.sequence_starts[-1] == len(batch.token_ids)
            starts = batch.sequence_starts.tolist()
            for start, end in itertools.pairwise(starts):
                assert batch.position_ids[start:end].tolist() == list(range(end - start))
            for row, target, token in zip(
                batch.rows.tolist(), batch.targets.tolist(), batch.tokens.tolist(), strict=True
            ):
                assert token not in read
                read[token] = target
                # The row's sequence up to and with the row is exactly what comes before the token.
                rollout = int(np.searchsorted(offsets, token, side="right")) - 1
                view = views[rollout]
                assert view is not None
                start = max(s for s in starts if s <= row)
                before = np.concatenate([view.prompt_ids, view.response_ids])
                place = len(view.prompt_ids) + token - offsets[rollout]
                assert batch.token_ids[start : row + 1].tolist() == before[:place].tolist()
    expected = {
        int(token): int(view.response_ids[token - offsets[i]])
        for i, view in enumerate(views)
        if view is not None
        for token in range(offsets[i], offsets[i + 1])
        if keep[token]
    }
    assert read == expected


def test_one_length_is_the_longest_and_filled_with_texts_no_longer_than_the_longest_text() -> None:
    """Attention's cost is that of the longest sequence squared; experts' is of the fullest."""
    views = [a_view(*lengths) for lengths in ((9, 8), (3, 4), (2, 1))]
    offsets = offsets_of(views)
    read = torch.zeros(int(offsets[-1]), dtype=torch.bool)
    read[:12] = True  # of the first two
    owners = np.array([0, 1, 1])
    cut: dict[str, Any] = {
        "max_tokens": 64,
        "num_ranks": 2,
        "multiple": 8,
        "one_length": True,
        "owners": owners,
    }
    longest = np.concatenate([views[0].prompt_ids, views[0].response_ids]).tolist()
    (first,) = pack(views, offsets, read, rank=0, **cut)
    assert first.sequence_starts.tolist() == [0, 17, 24]
    assert first.token_ids.tolist() == [*longest, *longest[:7]]
    nothing_of_its_own = dict(cut, owners=np.array([0, 0, 1]), max_tokens=17)
    empty = pack(views, offsets, read, rank=1, **nothing_of_its_own)
    assert [len(one.token_ids) for one in empty] == [8, 8], "its own longest, as many as rank 0 has"
    assert [len(one.tokens) for one in empty] == [0, 0]
    full = pack(views, offsets, read, rank=0, **nothing_of_its_own)
    assert [one.sequence_starts.tolist() for one in full] == [[0, 17, 24], [0, 7, 24]]


def test_owners_keep_their_rollouts_in_every_pass_and_every_rank_gets_as_many_micro_batches() -> (
    None
):
    """Student and teacher views differ in length; some rollouts are read in one pass only."""
    responses = RANDOM.integers(1, 12, 30)
    student = [
        a_view(int(p), int(r)) for p, r in zip(RANDOM.integers(1, 6, 30), responses, strict=True)
    ]
    teacher: list[View | None] = [
        None if i % 3 == 0 else a_view(int(p), int(r))
        for i, (p, r) in enumerate(zip(RANDOM.integers(6, 20, 30), responses, strict=True))
    ]
    offsets, minibatch_ids = offsets_of(student), [i // 10 for i in range(30)]
    lengths = [
        max(s.num_tokens, t.num_tokens if t else 0) for s, t in zip(student, teacher, strict=True)
    ]
    owners = assign_owners(lengths, minibatch_ids, num_ranks=3)
    for minibatch in range(3):
        loads = [
            sum(lengths[i] for i in range(30) if owners[i] == r and i // 10 == minibatch)
            for r in range(3)
        ]
        assert max(loads) - min(loads) <= max(lengths)
    everything = torch.ones(int(offsets[-1]), dtype=torch.bool)
    for views in (student, teacher):
        counts = set()
        for rank in range(3):
            cut = pack(
                views, offsets, everything, max_tokens=70, rank=rank, num_ranks=3, owners=owners
            )
            counts.add(len(cut))
            assert all(len(batch.token_ids) <= 70 for batch in cut)
            tokens = sorted(token for batch in cut for token in batch.tokens.tolist())
            mine = [i for i in range(30) if owners[i] == rank and views[i] is not None]
            assert tokens == [t for i in mine for t in range(offsets[i], offsets[i + 1])]
        assert len(counts) == 1


@pytest.mark.parametrize(("token", "wrong"), [(2, -1), (4, 1000)])
def test_a_token_outside_the_vocabulary_is_named_before_a_gpu_sees_it(
    token: int, wrong: int
) -> None:
    views = [a_view(3, 2), a_view(3, 2)]
    ids = views[1].prompt_ids if token < 3 else views[1].response_ids
    part, place = ("prompt", token) if token < 3 else ("response", token - 3)
    ids[place] = wrong
    keep = torch.ones(4, dtype=torch.bool)
    sizes: Any = {"max_tokens": 10, "rank": 0, "num_ranks": 1, "vocab_size": 1000}
    with pytest.raises(
        ValueError, match=f"token {wrong} at position {place} of the {part} of rollout 1 is outside"
    ):
        pack(views, offsets_of(views), keep, **sizes)
    ids[place] = 999
    pack(views, offsets_of(views), keep, **sizes)
