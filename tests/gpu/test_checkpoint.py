"""A checkpoint on a GPU: copied before the next step changes it, written beside that step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megasd.testing.tiny import tiny_qwen3
from tests.distributed import checkpoint_cases as cases
from tests.gpu.alone import join_alone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.usefixtures("one_rank")
def test_what_is_written_is_the_step_at_which_the_save_began(tmp_path: Path) -> None:
    folder = tiny_qwen3(
        tmp_path / "model", vocab=121, hidden=256, heads=4, head_dim=64, norm_spread=0.2
    )
    settings = {"device": "cuda", "dtype": "bfloat16", "teacher": {"weights": "ema", "decay": 0.5}}
    whole = cases.save_in_the_middle(folder, tmp_path, settings)
    join_alone("cuda")
    resumed, notes = cases.resume(folder, tmp_path, settings)
    assert notes == []
    assert resumed["version"] == whole["version"]
    # Kernels on a GPU may add in another order; a wrong optimizer state is off by far more.
    for (metrics, drawn, _, teacher), expected in zip(resumed["seen"], whole["seen"], strict=True):
        assert metrics["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.02)
        assert drawn == expected[1]
        np.testing.assert_allclose(teacher, expected[3], atol=0.05)


@pytest.mark.usefixtures("one_rank")
def test_a_run_whose_first_step_was_skipped_is_saved_and_resumes(tmp_path: Path) -> None:
    """With Transformer Engine, whose Adam has no state of its own before its first step."""
    folder = tiny_qwen3(tmp_path / "model", vocab=121, hidden=256, heads=4, head_dim=64)
    settings = {"device": "cuda", "dtype": "bfloat16"}
    whole = cases.save_before_the_first_step(folder, tmp_path, settings)
    join_alone("cuda")
    resumed = cases.resume_before_the_first_step(folder, tmp_path, settings)
    for name, weight in whole["weights"].items():
        np.testing.assert_allclose(resumed["weights"][name], weight, atol=0.02, err_msg=name)
