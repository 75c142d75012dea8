"""The logits of a vocabulary head, one block at a time, and what passes over them share.

A block is [chunk_tokens, 8192 rows of the vocabulary]. One forward pass leaves, for each token,
with logits l (after the temperature) and their maximum m:

    m    total S = sum_j exp(l_j - m)    moment U = sum_j exp(l_j - m) (l_j - m)

These statistics of two disjoint sets of vocabulary rows combine into those of their union, the
log-sum-exp way: blocks of one rank and the shards of a tensor-parallel group are joined by the
same function. So are the k largest logits.

On a GPU, Triton kernels (policy/head/kernels.py) make each pass over a block in one launch; they
join a block's statistics to those before it on the way. Elsewhere torch's own operations do, here
and in head.py and divergence.py.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_BLOCK_ROWS = 8192  # [1024, 8192] float32 logits are 32 MiB: about what a large cache holds


@functools.cache
def find_kernels(device_type: str) -> ModuleType | None:
    """policy/head/kernels.py, on GPUs where Triton works. Where it does not, a warning says why."""
    if device_type != "cuda":
        return None
    try:
        from megasd.policy.head import kernels

        one = torch.ones(1, 1, device=device_type)
        kernels.sum_over_equal_ids(one.long(), one)
    except Exception as error:  # no triton, no C compiler for its launchers, no assembler, ...
        warnings.warn(
            "the vocabulary head runs without its Triton kernels, more slowly: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels


class Cut(NamedTuple):
    """Which logits a rank computes, and how many at a time."""

    first_id: int  # vocabulary id of the first local row
    valid_rows: int  # local rows that are not padding; may be 0
    temperature: float
    chunk_tokens: int

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        *,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk_tokens: int,
    ) -> "Cut":
        """This rank's part; ValueError where the operands do not fit together."""
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
            raise ValueError(
                f"hidden is {hidden.dtype} and the head's weight {weight.dtype}; "
                "both must be bfloat16, both float32 or both float64"
            )
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if chunk_tokens < 1:
            raise ValueError(f"model.head_chunk_tokens is {chunk_tokens}; it must be at least 1")
        shard_rows = weight.shape[0]
        if shard_rows * size < vocab_size:
            raise ValueError(
                f"{size} shards of {shard_rows} rows cannot hold a vocabulary of {vocab_size}; "
                "pass the output weight of this tensor-parallel rank, padded rows included"
            )
        first_id = rank * shard_rows
        valid_rows = min(max(vocab_size - first_id, 0), shard_rows)
        return cls(first_id, valid_rows, temperature, chunk_tokens)


class Tile(NamedTuple):
    """Consecutive vocabulary rows of this rank."""

    rows: slice  # of the local weight
    first_id: int  # vocabulary id of the first of them
    weight: Tensor  # [rows, H], ready to multiply

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where `ids` stand in the tile [same shape], and which of them really do (bool)."""
        places = ids - self.first_id
        size = self.weight.shape[0]
        return places.clamp(0, size - 1), (places >= 0) & (places < size)


class LogitBlocks:
    """This rank's logits, one [chunk of tokens, tile of rows] block at a time, in the same memory.

    What every pass over the vocabulary shares:

        for tile in blocks.tiles():
            for tokens in blocks.chunks:
                logits = blocks.logits(tile, tokens)  # valid until the next call; write into it

    Products of bfloat16 operands are taken in bfloat16 with float32 sums on CUDA; elsewhere the
    operands are cast, which is exact.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, cut: Cut) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)  # of logits and sums
        self.operand_dtype = _operand_dtype(hidden, self.dtype)
        self.kernels = find_kernels(hidden.device.type) if self.dtype == torch.float32 else None
        self.hidden = hidden.to(self.operand_dtype)
        self.chunks = list(_slices(hidden.shape[0], cut.chunk_tokens))
        self._weight = weight[: cut.valid_rows]
        self._cut = cut
        self._block_size = min(cut.chunk_tokens, len(hidden)) * min(_BLOCK_ROWS, cut.valid_rows)
        self._rooms: dict[str, Tensor] = {}

    def tiles(self) -> Iterator[Tile]:
        return map(self.tile, _slices(self._weight.shape[0], _BLOCK_ROWS))

    def tile(self, rows: slice) -> Tile:
        weight = self._weight[rows].to(self.operand_dtype)
        return Tile(rows, self._cut.first_id + rows.start, weight)

    def logits(self, tile: Tile, tokens: slice) -> Tensor:
        """hidden @ weight.T / temperature of these tokens and rows."""
        hidden = self.hidden[tokens]
        block = self._room("logits", (hidden.shape[0], tile.weight.shape[0]), self.dtype)
        _add_product(block, hidden, tile.weight.T, alpha=1.0 / self._cut.temperature, beta=0.0)
        return block

    def scratch(self, logits: Tensor) -> Tensor:
        """Room for a second block of the same shape, for as long as `logits` is valid."""
        return self._room("scratch", logits.shape, self.dtype)

    def gradient(self, logits: Tensor) -> Tensor:
        """Room for the gradient of a block, ready to multiply; as valid as `logits`."""
        return self._room("gradient", logits.shape, self.operand_dtype)

    def _room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if name not in self._rooms:
            self._rooms[name] = self.hidden.new_empty(self._block_size, dtype=dtype)
        return self._rooms[name][: math.prod(shape)].view(*shape)


class TopLogits:
    """The k largest logits of each token so far and their ids, [N, k]; ties: the lower id."""

    def __init__(self, k: int, blocks: LogitBlocks) -> None:
        shape = (blocks.hidden.shape[0], k)
        self.logits = blocks.hidden.new_full(shape, -torch.inf, dtype=blocks.dtype)
        # Ids of nothing: they differ, for the kernel replaces one at a time.
        nothing = torch.iinfo(torch.int64).max - torch.arange(k, device=blocks.hidden.device)
        self.ids = nothing.repeat(shape[0], 1)

    def take(self, blocks: LogitBlocks, logits: Tensor, tile: Tile, tokens: slice) -> None:
        """Merge one block in; `logits` is only read."""
        k, size = self.ids.shape[1], logits.shape[1]
        if k < size:
            # topk may take any of equal values. All keys differ: by place, 1 .. size, and above
            # that by whether the logit is below, equal to or above the k-th largest.
            lowest = logits.topk(k, dim=1).values[:, -1:]
            keys = blocks.scratch(logits).copy_(logits >= lowest).add_(logits > lowest)
            keys.mul_(size).add_(torch.arange(size, 0, -1, device=logits.device))
            places = keys.topk(k, dim=1).indices
        else:
            places = torch.arange(size, device=logits.device).expand(logits.shape)
        self.logits[tokens], self.ids[tokens] = _largest(
            k,
            torch.cat((self.logits[tokens], logits.gather(1, places)), dim=1),
            torch.cat((self.ids[tokens], tile.first_id + places), dim=1),
        )

    def join(self, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Logits and ids [N, k] over all shards of the group."""
        logits = torch.cat(gather(self.logits, group).unbind(), dim=1)
        ids = torch.cat(gather(self.ids, group).unbind(), dim=1)
        return _largest(self.ids.shape[1], logits, ids)


def _largest(k: int, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of each row, falling; of equal ones the lower id first."""
    ids, order = ids.sort(dim=1)
    logits, places = logits.gather(1, order).sort(dim=1, descending=True, stable=True)
    return logits[:, :k], ids.gather(1, places)[:, :k]


def local_statistics(
    blocks: LogitBlocks, wanted: Tensor | None = None, top: TopLogits | None = None
) -> Tensor:
    """[3 + W, N] of this rank's rows, in one pass that also fills `top`.

    Rows 0 to 2 are maximum, total and moment; the others are the logits at the ids `wanted`
    [N, W], 0 where an id is not here.
    """
    num_tokens, device = blocks.hidden.shape[0], blocks.hidden.device
    if wanted is None:
        wanted = torch.empty((num_tokens, 0), dtype=torch.int64, device=device)
    shape = (3 + wanted.shape[1], num_tokens)
    statistics = torch.zeros(shape, dtype=blocks.dtype, device=device)
    statistics[0] = torch.finfo(blocks.dtype).min  # not -inf: its difference to itself must be 0
    for tile in blocks.tiles():
        if blocks.kernels is None:
            part = _tile_statistics(blocks, tile, wanted, top)
            statistics = combine(torch.stack((statistics, part)))
            continue
        for tokens in blocks.chunks:
            kept = None if top is None else (top.logits[tokens], top.ids[tokens])
            blocks.kernels.add_statistics(
                blocks.logits(tile, tokens),
                tile.first_id,
                wanted[tokens],
                statistics[:, tokens],
                kept,
            )
    return statistics


def _tile_statistics(
    blocks: LogitBlocks, tile: Tile, wanted: Tensor, top: TopLogits | None
) -> Tensor:
    num_tokens, num_wanted = wanted.shape
    part = blocks.hidden.new_empty(3 + num_wanted, num_tokens, dtype=blocks.dtype)
    for tokens in blocks.chunks:
        logits = blocks.logits(tile, tokens)
        places, here = tile.locate(wanted[tokens])
        part[3:, tokens] = logits.gather(1, places).where(here, 0.0).T
        if top is not None:
            top.take(blocks, logits, tile, tokens)
        maximum = logits.amax(dim=1)
        shifted = logits.sub_(maximum[:, None])
        weights = torch.exp(shifted, out=blocks.scratch(shifted))
        part[0, tokens] = maximum
        part[1, tokens] = weights.sum(dim=1)
        part[2, tokens] = weights.mul_(shifted).sum(dim=1)
    return part


def combine(parts: Tensor) -> Tensor:
    """Joins the statistics [P, 3 + W, N] of disjoint sets of vocabulary rows into those of all."""
    maxima, totals, moments = parts[:, :3].unbind(dim=1)
    maximum = maxima.amax(dim=0)
    shift = maxima - maximum
    scale = shift.exp()
    total = (totals * scale).sum(dim=0)
    moment = ((moments + totals * shift) * scale).sum(dim=0)
    return torch.cat((torch.stack((maximum, total, moment)), parts[:, 3:].sum(dim=0)))


def gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[P, *shape of values]: those of every rank of the group, in its order."""
    if group is None:
        return values[None]
    shards = values.new_empty(dist.get_world_size(group), *values.shape)
    if values.numel():
        dist.all_gather(list(shards.unbind()), values.contiguous(), group=group)
    return shards


def input_gradients(
    blocks: LogitBlocks,
    hidden: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool],
    logit_gradient: Callable[[Tile, slice], Tensor],
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `hidden` and `weight`, each where needed, from those of the logit blocks.

    `logit_gradient` returns the gradient at one block of hidden @ weight.T, ready to multiply. With
    `main_grad` the weight's is added to that and to nothing else; see `_added_to_main_grad`.
    """
    need_hidden, need_weight = needs
    grad_hidden = torch.zeros_like(hidden, dtype=blocks.dtype) if need_hidden else None
    grad_weight = torch.zeros_like(weight) if need_weight and main_grad is None else None
    for tile in blocks.tiles():
        sums = None
        if grad_weight is not None:
            sums = torch.zeros_like(tile.weight, dtype=blocks.dtype)
        elif need_weight and main_grad is not None:
            sums = main_grad[tile.rows]
        for tokens in blocks.chunks:
            block = logit_gradient(tile, tokens)
            if grad_hidden is not None:
                _add_product(grad_hidden[tokens], block, tile.weight)
            if sums is not None:
                _add_product(sums, block.T, blocks.hidden[tokens])
        if grad_weight is not None and sums is not None:
            grad_weight[tile.rows] = sums
    if grad_hidden is not None:
        grad_hidden = grad_hidden.to(hidden.dtype)
    if need_weight and main_grad is not None:
        grad_weight = _added_to_main_grad(weight)
    return grad_hidden, grad_weight


def main_grad_of(weight: Tensor) -> Tensor | None:
    """The float32 buffer in which Megatron's DDP sums a parameter's gradients; None without one."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return None
    return (
        main_grad if main_grad.dtype == torch.promote_types(weight.dtype, torch.float32) else None
    )


def _added_to_main_grad(weight: Tensor) -> Tensor | None:
    """What a backward pass returns of a gradient that is in `main_grad`, as Megatron's layers do.

    Its hook then leaves the returned tensor alone: arbitrary values, there because the hook of an
    overlapped reduction wants one. Not where the stage's embedding is the same parameter: autograd
    would add the two, and the hook adds the embedding's alone.
    """
    if getattr(weight, "zero_out_wgrad", False):  # Megatron's mark of such a parameter
        return None
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return torch.empty_like(weight)


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # in a backward pass: only under create_graph=True
        raise RuntimeError("the vocabulary head has no second derivative; drop create_graph")


def _add_product(
    out: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """out <- beta out + alpha left @ right, summed in the dtype of `out`."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, alpha=alpha, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)


def _operand_dtype(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What products are taken of: only CUDA's sum bfloat16 operands in float32."""
    return hidden.dtype if hidden.is_cuda else dtype


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
