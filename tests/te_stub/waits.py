"""Where a GPU would be waited for: operations whose result the host needs before it goes on."""

import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.te_stub import kernels

# Values, and shapes that depend on values.
_WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "_unique",
    "unique_",
    "masked_select",
    "equal.default",
)
_WAITING += ("bincount", "repeat_interleave.Tensor")
_READING = ("tolist", "numpy", "cpu")  # on a CPU these run no operation
_OURS = ("megasd.", "megatron.", "transformer_engine.")
_ON_THE_HOST = (
    ("megatron.core.tensor_parallel.random", "fork"),  # compares states of the CPU's generator
    ("megasd.policy.head.head", "_check_ids"),  # returns at once where ids are on a GPU
)


class _Waits(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith(("index.Tensor", "index_put")) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name.startswith(_WAITING):
            note(self.found, name)
        return func(*args, **(kwargs or {}))


def note(found: Counter[str], what: str) -> None:
    if kernels.is_inside_a_kernel():
        return
    frame = sys._getframe(1)
    while frame is not None and not _module(frame).startswith(_OURS):
        frame = frame.f_back
    if frame is not None and (_module(frame), frame.f_code.co_name) in _ON_THE_HOST:
        return
    where = f"{_module(frame)}:{frame.f_lineno}" if frame else "elsewhere"
    found[f"{what} in {where}"] += 1


def _module(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "")


@contextmanager
def counted(found: Counter[str]) -> Iterator[None]:
    """Within the block, each operation that waits is noted in `found`, with where it stands."""
    real = {name: getattr(torch.Tensor, name) for name in _READING}
    tensor: Any = torch.Tensor

    def noting(name: str) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            note(found, name)
            return real[name](self, *args, **kwargs)

        return read

    for name in _READING:
        setattr(tensor, name, noting(name))
    try:
        with _Waits(found):
            yield
    finally:
        for name, method in real.items():
            setattr(tensor, name, method)
