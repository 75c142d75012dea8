"""Transformer Engine and apex as they are laid out, with kernels that no CPU can run."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

_KERNELS = """
    def kernel(*_, **__):
        raise AssertionError("a kernel of CUDA was called on a CPU")
    FusedAdam = FusedSGD = kernel
    multi_tensor_applier = multi_tensor_scale = multi_tensor_l2norm = kernel
"""
DECOYS: Mapping[str, str] = {
    "transformer_engine/__init__.py": "__version__ = '2.11.0'",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/optimizers.py": _KERNELS,
    "apex/__init__.py": "",
    "apex/optimizers.py": _KERNELS,
    "apex/multi_tensor_apply.py": _KERNELS,
}


def install_decoys(folder: Path, transformer_engine: str = "") -> Path:
    """The folder for PYTHONPATH; `transformer_engine` is what importing its part for torch does."""
    changed = {"transformer_engine/pytorch/__init__.py": transformer_engine}
    for name, text in {**DECOYS, **changed}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder
