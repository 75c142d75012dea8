"""Triton's interpreter: the head's kernels as they are, on a CPU, an operation at a time."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megasd.policy import head
from megasd.policy.head import blocks

FOLDER = Path(sys.prefix, "triton")  # tools/setup.sh: beside what the environment can import
NEEDS_TRITON = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs Triton in .venv/triton; tools/setup.sh installs it"
)
_aside: dict[str, ModuleType] = {}


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[ModuleType]:
    """policy/head/kernels.py, which the head uses on CPU tensors meanwhile.

    Before and after, what else runs in this process finds no Triton.
    """
    before = set(sys.modules)
    sys.modules.update(_aside)  # its C++ part cannot be imported twice
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(sys, "path", [*sys.path, str(FOLDER)])
        kernels = importlib.import_module("megasd.policy.head.kernels")
        patch.setattr(blocks, "find_kernels", lambda _: kernels)
        try:
            yield kernels
        finally:
            head.__dict__.pop("kernels", None)
            for name in set(sys.modules) - before:
                if name.partition(".")[0] == "triton" or name == kernels.__name__:
                    _aside[name] = sys.modules.pop(name)
