"""Views to packed micro-batches, and back to response space. The only file that knows the shift.

A view is packed as prompt + response in one row with the others of its micro-batch. The token at
position p is predicted by the hidden state at p - 1, so response token t of a view whose prompt
has P tokens is read off row P - 1 + t. Nobody else computes such an index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from megasd.types import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Whole sequences laid end to end (T tokens); n of the T + 1 next tokens are read.

    Padding is sequences of its own at the end, of which nothing is read.
    """

    token_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]  # from 0 in each sequence
    sequence_starts: Int[Tensor, " S1"]  # int32, cumulative lengths
    longest_sequence: int
    rows: Int[Tensor, " n"]  # the row whose hidden state predicts each target
    targets: Int[Tensor, " n"]
    tokens: Int[Tensor, " n"]  # the place of each target in response space

    def to(self, device: torch.device) -> "Microbatch":
        """On `device`; a GPU is not waited for, which takes copies from pinned memory."""
        pins = device.type == "cuda"
        tensors = {
            name: (value.pin_memory() if pins else value).to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **tensors)


def assign_owners(
    lengths: Sequence[int], minibatch_ids: Sequence[int], *, num_ranks: int
) -> np.ndarray:
    """The rank that reads each rollout in every pass of a step: [R] int64.

    Where a pass leaves values that are too large to travel ([tokens, K]), the next one must run
    on the same rank. Within each mini-batch the ranks get nearly the same number of tokens:
    longest first, always to the least loaded. Ties go to the lower rank.
    """
    owners = np.zeros(len(lengths), dtype=np.int64)
    loads: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load = loads.setdefault(minibatch_ids[i], [0] * num_ranks)
        owners[i] = load.index(min(load))
        load[owners[i]] += lengths[i]
    return owners


def balance(
    lengths: Sequence[int], *, max_tokens: int, num_ranks: int, at_least: int = 1
) -> list[list[list[int]]]:
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
    per_rank = max(at_least, -(-sum(lengths) // (max_tokens * num_ranks)))
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
    one_length: bool = False,
    owners: np.ndarray | None = None,
    vocab_size: int | None = None,
) -> list[Microbatch]:
    """The micro-batches of data-parallel rank `rank`.

    `views[i]` is what is read of rollout i (None: nothing); `offsets` [R + 1] its place in
    response space; `keep` says which response tokens are read off. A view none of whose tokens
    are kept is not packed. `multiple`: every T is one of it, as sequence parallelism wants;
    `one_length`: all are the longest of them. `owners` [R]: the ranks of `assign_owners`; without
    them, each pass is balanced by itself. Raises ValueError for a token outside
    0 .. `vocab_size` - 1, on all ranks: a GPU is never asked, as it would have to be waited for.
    """
    kept = keep.cpu().numpy()
    used = [
        i
        for i, view in enumerate(views)
        if view is not None and kept[offsets[i] : offsets[i + 1]].any()
    ]
    lengths = {i: view.num_tokens for i in used if (view := views[i]) is not None}
    if owners is None:
        shares = balance(list(lengths.values()), max_tokens=max_tokens, num_ranks=num_ranks)
        cut = [[used[k] for k in part] for part in shares[rank]]
    else:
        cut = _cut_of_owner(lengths, owners, max_tokens=max_tokens, rank=rank, num_ranks=num_ranks)
    if vocab_size is not None:
        for i in lengths:
            _check_vocabulary(i, views[i], vocab_size)
    sizes = [max(1, sum(lengths[i] for i in part)) for part in cut]
    if one_length:
        sizes = [max(sizes)] * len(sizes)
    filler = _longest_text(views, lengths) if lengths else np.zeros(multiple, dtype=np.int64)
    return [
        _lay_out(part, views, offsets, kept, size + -size % multiple, filler)
        for part, size in zip(cut, sizes, strict=True)
    ]


def _longest_text(views: Sequence[View | None], lengths: Mapping[int, int]) -> np.ndarray:
    view = views[max(lengths, key=lambda i: lengths[i])]
    assert view is not None
    return np.concatenate([view.prompt_ids, view.response_ids])


def _check_vocabulary(rollout: int, view: View | None, vocab_size: int) -> None:
    assert view is not None
    for name, ids in (("prompt", view.prompt_ids), ("response", view.response_ids)):
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            place = np.flatnonzero((ids < 0) | (ids >= vocab_size))[0]
            raise ValueError(
                f"token {ids[place]} at position {place} of the {name} of rollout {rollout} is "
                f"outside the vocabulary of {vocab_size}; does the tokenizer belong to the model?"
            )


def _cut_of_owner(
    lengths: Mapping[int, int], owners: np.ndarray, *, max_tokens: int, rank: int, num_ranks: int
) -> list[list[int]]:
    """The micro-batches of what `rank` owns; all ranks get as many as the one that needs most."""
    owned = [[i for i in lengths if owners[i] == r] for r in range(num_ranks)]

    def cut(r: int, at_least: int) -> list[list[int]]:
        sizes = [lengths[i] for i in owned[r]]
        (parts,) = balance(sizes, max_tokens=max_tokens, num_ranks=1, at_least=at_least)
        return [[owned[r][k] for k in part] for part in parts]

    most = max(len(cut(r, 1)) for r in range(num_ranks))
    return cut(rank, most)


def _lay_out(
    members: Sequence[int],
    views: Sequence[View | None],
    offsets: np.ndarray,
    kept: np.ndarray,
    num_tokens: int,
    filler: np.ndarray,
) -> Microbatch:
    """`members`, then `filler` over and over, up to `num_tokens`.

    The filler is a text of the pass: one token repeated would meet the same experts every time.
    """
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
    if padding := num_tokens - start:
        whole, rest = divmod(padding, len(filler))
        lengths += [len(filler)] * whole + [rest] * (rest > 0)
        ids.append(np.resize(filler, padding))
    token_ids = torch.from_numpy(np.concatenate(ids, dtype=np.int64))
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
