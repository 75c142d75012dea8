"""What ranks run for the tests of the planner: what Megatron holds, and what a forward saves."""

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megasd.types import View
from tests.distributed.policy_cases import PlainLoss, batch_and_credit, make_policy, offsets_of


def held_by_megatron(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Elements and bytes of a real policy on this rank, and the rank's place."""
    policy = make_policy(folder, settings)
    from megatron.core import parallel_state  # not before the backend was chosen

    buffers = [*policy.state.ddp.buffers, *policy.state.ddp.expert_parallel_buffers]
    return {
        "stage": policy.layout.pp_rank,
        "dp_rank": policy.layout.dp_rank,
        "expert_dp_rank": parallel_state.get_expert_data_parallel_rank(),
        "parameters": sum(p.numel() for p in policy.state.gpt.parameters()),
        "weights": sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(tensor.nbytes for tensor in _optimizer_tensors(policy.state.optimizer)),
    }


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments, and masters where they are no views of the parameters; steps are no state here."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            yield from (state["exp_avg"], state["exp_avg_sq"])
        for group in part.shard_fp32_from_float16_groups:
            yield from group


def saved_by_forward(
    folder: Path, settings: Mapping[str, Any], cuts: Sequence[tuple[int, int]]
) -> list[int]:
    """Bytes of every tensor that a micro-batch's forward saves, for (sequences, length) of `cuts`.

    A storage counts once and whole, as it lives whole; parameters do not count.
    """
    return saved_and_peak(folder, settings, cuts)[0]


# No backward pass follows: the graph stays, and with it the groups that one would use.
saved_by_forward.keeps_groups = True  # pyright: ignore[reportFunctionMemberAccess]


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations within it made and nobody has freed, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.sizes.keys():
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_of_a_microbatch(
    folder: Path, settings: Mapping[str, Any], count: int, length: int
) -> tuple[int, list[int]]:
    """The most bytes alive in a forward and a backward pass, beside weights and gradients; and
    how many tokens this rank's experts computed, by layer."""
    policy = make_policy(folder, settings)
    from megasd.policy import forward  # not before the backend was chosen

    microbatch = _microbatch(count, length)
    computed: dict[str, int] = {}

    def note(name: str, inputs: tuple[Any, ...]) -> None:
        computed[name] = inputs[0].shape[0]

    for name, module in policy.state.gpt.named_modules():
        if name.endswith(".mlp.experts"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
    peaks = []
    with LiveStorages() as storages:
        for _ in range(3):  # gloo's threads hold what they sent, sometimes longer than others
            storages.peak = storages.now
            # No variable holds the hidden states, nor their gradient: a head would not either.
            forward.hidden_states(policy.state.ddp, microbatch).sum().backward()
            peaks.append(storages.peak)
    return min(peaks), list(computed.values())


def peak_of_an_update(
    folder: Path, settings: Mapping[str, Any], count: int, length: int
) -> tuple[int, int]:
    """The same of a whole optimizer step over one micro-batch, with its head and its loss; and
    the bytes that are still alive after it."""
    policy = make_policy(folder, {**settings, "max_tokens": count * length})
    views = [view for view in _views(count, length) if view is not None]
    batch, credit = batch_and_credit(views, seed=0)
    with LiveStorages() as storages:
        policy.update(views, offsets_of(views), batch, credit, PlainLoss(), minibatch=0)
        time.sleep(0.1)  # gloo's threads let go of what they have summed
    return storages.peak, storages.now


def saved_and_peak(
    folder: Path, settings: Mapping[str, Any], cuts: Sequence[tuple[int, int]]
) -> tuple[list[int], int]:
    """The same, and the most that a GPU had allocated in a forward and a backward pass."""
    policy = make_policy(folder, settings)
    from megasd.policy import forward  # not before the backend was chosen

    kept = {p.untyped_storage().data_ptr() for p in policy.state.gpt.parameters()}
    answers = []
    for count, length in cuts:
        microbatch = _microbatch(count, length)
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, Any] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in kept:
                storages[storage.data_ptr()] = storage  # held: an address is not used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            placed = microbatch.to(policy.backend.device)
            total = forward.hidden_states(policy.state.ddp, placed).sum()
        answers.append(sum(storage.nbytes() for storage in storages.values()))
        storages.clear()
        if policy.backend.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            total.backward()
        del total
    return answers, torch.cuda.max_memory_allocated() if policy.backend.is_cuda else 0


def _views(count: int, length: int) -> list[View | None]:
    """Sequences of `length` tokens, half of each a prompt."""
    draw = np.random.default_rng(count)
    return [
        View(
            prompt_ids=draw.integers(1, 90, length // 2),
            response_ids=draw.integers(1, 90, length - length // 2),
        )
        for _ in range(count)
    ]


def _microbatch(count: int, length: int) -> Any:
    from megasd.policy.sequences import pack

    offsets = np.arange(count + 1) * (length - length // 2)
    read = torch.ones(int(offsets[-1]), dtype=torch.bool)
    (microbatch,) = pack(
        _views(count, length), offsets, read, max_tokens=count * length, rank=0, num_ranks=1
    )
    return microbatch
