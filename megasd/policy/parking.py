"""Device memory lent out: the bytes of tensors wait in host memory, and come back where they were.

Megatron has an `offload_to_cpu` for optimizers and for buffers. The optimizer's gives its tensors
new memory on the way back: master weights that were views of the parameters are no longer, the
count of steps that torch's AdamW keeps on the CPU comes back on the GPU, and host memory is
neither pinned nor kept. Here a tensor's storage is emptied and filled again, and so every view of
it stays one: the parameters and gradients of Megatron's buffers, the optimizer's slices of them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from megasd.policy.state import PolicyState

# Of the pinned host memory that is asked for at once: torch rounds up to a power of two.
BLOCK_BYTES = 2**28


class Parking:
    """Storages that can be emptied; the host memory of the first time serves every other."""

    def __init__(self, *, pinned: bool, block_bytes: int = BLOCK_BYTES) -> None:
        self._pinned, self._block_bytes = pinned, block_bytes
        self._blocks: list[Tensor] = []
        self._emptied: list[tuple[UntypedStorage, int, bool]] = []  # size, whether it was kept

    @property
    def is_full(self) -> bool:
        return bool(self._emptied)

    def park(self, keep: Iterable[Tensor], drop: Iterable[Tensor] = ()) -> int:
        """Empties what is behind the tensors; returns how many bytes that were.

        Those of `drop` come back as zeros. Nobody may read any of them until then.
        """
        assert not self.is_full, "restore first"
        kept = _storages(keep)
        dropped = {key: one for key, one in _storages(drop).items() if key not in kept}
        place = 0
        for storage in kept.values():
            for device, host in self._pieces(storage, place):
                host.copy_(device, non_blocking=self._pinned)
            place += storage.nbytes()
        for storages, is_kept in ((kept, True), (dropped, False)):
            for storage in storages.values():
                self._emptied.append((storage, storage.nbytes(), is_kept))
                storage.resize_(0)
        return sum(size for _, size, _ in self._emptied)

    def restore(self) -> None:
        """Everything is where it was, to the bit; nothing to do where nothing is parked."""
        place = 0
        for storage, size, is_kept in self._emptied:
            storage.resize_(size)
            if not is_kept:
                _bytes(storage).zero_()
                continue
            for device, host in self._pieces(storage, place):
                device.copy_(host, non_blocking=self._pinned)
            place += size
        self._emptied = []

    def _pieces(self, storage: UntypedStorage, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The storage from its beginning on, and the host memory from byte `place` on."""
        device, begin = _bytes(storage), 0
        while begin < len(device):
            number, start = divmod(place + begin, self._block_bytes)
            while number >= len(self._blocks):
                self._blocks.append(
                    torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=self._pinned)
                )
            size = min(len(device) - begin, self._block_bytes - start)
            yield device[begin : begin + size], self._blocks[number][start : start + size]
            begin += size


def gradients(state: PolicyState) -> Iterator[Tensor]:
    """Megatron's buffers of them, which every update begins by zeroing."""
    wrapped: Any = state.ddp  # its `buffers` are no longer torch's
    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        yield buffer.grad_data


def optimizer_state(state: PolicyState) -> Iterator[Tensor]:
    """On the device: masters and moments. Of a model in float32 the weights are the masters."""
    weights = {p.untyped_storage().data_ptr() for p in state.gpt.parameters()}
    for part in state.optimizer.chained_optimizers:
        if part.optimizer is None:  # of a stage that trains nothing
            continue
        groups = part.optimizer.param_groups
        masters = [parameter for group in groups for parameter in group["params"]]
        moments = [value for values in part.optimizer.state.values() for value in values.values()]
        for tensor in (*masters, *moments):
            is_here = isinstance(tensor, Tensor) and tensor.device.type == state.device.type
            if is_here and tensor.untyped_storage().data_ptr() not in weights:
                yield tensor.detach()


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Each one once, however many views of it there are; those that hold nothing left out."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {one.data_ptr(): one for one in storages if one.nbytes()}


def _bytes(storage: UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))  # pyright: ignore
