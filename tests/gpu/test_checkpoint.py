"""A checkpoint on a GPU: copied before the next step changes it, written beside that step."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megasd.testing.tiny import tiny_qwen3
from tests.distributed import checkpoint_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_what_is_written_is_the_step_at_which_the_save_began(tmp_path: Path) -> None:
    from megasd.policy import backend
    from megasd.testing.ranks import forget_model_parallel

    os.environ.pop("RANK", None)
    if not torch.distributed.is_initialized():
        backend.join_ranks(backend.start("cuda"), timeout_seconds=60)
    forget_model_parallel()
    folder = tiny_qwen3(
        tmp_path / "model", vocab=121, hidden=256, heads=4, head_dim=64, norm_spread=0.2
    )
    settings = {"device": "cuda", "dtype": "bfloat16", "teacher": {"weights": "ema", "decay": 0.5}}
    whole = cases.save_in_the_middle(folder, tmp_path, settings)
    forget_model_parallel()
    resumed, notes = cases.resume(folder, tmp_path, settings)
    assert notes == []
    assert resumed["version"] == whole["version"]
    # Kernels on a GPU may add in another order; a wrong optimizer state is off by far more.
    for (metrics, drawn, _, teacher), expected in zip(resumed["seen"], whole["seen"], strict=True):
        assert metrics["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.02)
        assert drawn == expected[1]
        np.testing.assert_allclose(teacher, expected[3], atol=0.05)
