"""Views to packed micro-batches, and back to response space. The only file that knows the shift.

A view is packed as prompt + response in one row with the others of its micro-batch. The token at
position p is predicted by the hidden state at p - 1, so response token t of a view whose prompt
has P tokens is read off row P - 1 + t. Nobody else computes such an index.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from megasd.types import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Whole sequences laid end to end (T tokens); n of the T + 1 next tokens are read."""

    token_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]  # from 0 in each sequence
    sequence_starts: Int[Tensor, " S1"]  # int32, cumulative lengths, padding as the last sequence
    longest_sequence: int
    rows: Int[Tensor, " n"]  # the row whose hidden state predicts each target
    targets: Int[Tensor, " n"]
    tokens: Int[Tensor, " n"]  # the place of each target in response space

    def to(self, device: torch.device) -> "Microbatch":
        tensors = {
            name: value.to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **tensors)


def balance(lengths: Sequence[int], *, max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Cut sequences into micro-batches of at most `max_tokens`: [rank][micro-batch][sequence].

    Every rank gets the same number of micro-batches (expert parallelism and pipelines need it)
    and nearly the same number of tokens: longest first, always into the emptiest. The cut depends
    on nothing but the arguments, so all ranks agree on it without a word.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > max_tokens:
        raise ValueError(
            f"optimizer.max_tokens_per_microbatch: {max_tokens} is less than the "
            f"{lengths[order[0]]} tokens of the longest sequence; raise it, or lower "
            "data.max_prompt_tokens, context.max_tokens or rollout.max_response_tokens"
        )
    per_rank = max(1, -(-sum(lengths) // (max_tokens * num_ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * num_ranks)]
        loads = [(0, b) for b in range(len(bins))]
        heapify(loads)
        for i in order:
            load, b = loads[0]
            if load + lengths[i] > max_tokens:
                break  # the emptiest is too full: one more micro-batch for every rank
            bins[b].append(i)
            heapreplace(loads, (load + lengths[i], b))
        else:
            break
        per_rank += 1
    heaviest_first = sorted(bins, key=lambda b: -sum(lengths[i] for i in b))
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for place, members in enumerate(heaviest_first):  # there and back again, like a snake
        turn, seat = divmod(place, num_ranks)
        dealt[seat if turn % 2 == 0 else num_ranks - 1 - seat].append(sorted(members))
    return dealt


def pack(
    views: Sequence[View | None],
    offsets: np.ndarray,
    keep: Bool[Tensor, " N"],
    *,
    max_tokens: int,
    rank: int,
    num_ranks: int,
    multiple: int = 1,
) -> list[Microbatch]:
    """The micro-batches of data-parallel rank `rank`.

    `views[i]` is what is read of rollout i (None: nothing); `offsets` [R + 1] its place in
    response space; `keep` says which response tokens are read off. A view none of whose tokens
    are kept is not packed. `multiple`: padding of T for sequence parallelism.
    """
    kept = keep.cpu().numpy()
    used = [
        i
        for i, view in enumerate(views)
        if view is not None and kept[offsets[i] : offsets[i + 1]].any()
    ]
    lengths = [len(v.prompt_ids) + len(v.response_ids) for v in views if v is not None]
    by_view = dict(zip([i for i, v in enumerate(views) if v is not None], lengths, strict=True))
    cut = balance([by_view[i] for i in used], max_tokens=max_tokens, num_ranks=num_ranks)[rank]
    return [_lay_out([used[k] for k in part], views, offsets, kept, multiple) for part in cut]


def _lay_out(
    members: Sequence[int],
    views: Sequence[View | None],
    offsets: np.ndarray,
    kept: np.ndarray,
    multiple: int,
) -> Microbatch:
    ids, lengths, rows, tokens = [], [], [], []
    start = 0
    for i in members:
        view = views[i]
        assert view is not None
        length, prompt = view.num_tokens, len(view.prompt_ids)
        assert len(view.response_ids) == offsets[i + 1] - offsets[i]
        read = np.flatnonzero(kept[offsets[i] : offsets[i + 1]])
        ids += [view.prompt_ids, view.response_ids]
        rows.append(start + prompt - 1 + read)
        tokens.append(offsets[i] + read)
        lengths.append(length)
        start += length
    padding = -start % multiple
    if padding or not members:  # an empty micro-batch still takes part in every collective
        lengths.append(max(padding, multiple if not members else 0))
        ids.append(np.zeros(lengths[-1], dtype=np.int64))
    token_ids = torch.from_numpy(np.concatenate(ids))
    row_index = torch.from_numpy(np.concatenate([*rows, np.zeros(0, dtype=np.int64)]))
    return Microbatch(
        token_ids=token_ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        sequence_starts=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        longest_sequence=max(lengths),
        rows=row_index,
        targets=token_ids[row_index + 1],
        tokens=torch.from_numpy(np.concatenate([*tokens, np.zeros(0, dtype=np.int64)])),
    )
