"""What a step does beside its matrix products. Not yet run on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megasd.testing.tiny import tiny_qwen3
from tests.distributed import policy_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"dtype": "bfloat16", "device": "cuda", "max_tokens": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_qwen3(path, vocab=128, hidden=256, heads=4, kv_heads=2, head_dim=64, tie=False)


def test_the_micro_batches_of_a_dense_model_wait_for_nothing(
    folder: Path, one_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second time on; the first compiles and chooses kernels."""
    if not one_rank.transformer_engine:
        pytest.skip("Megatron's local layers wait, for tests only")
    policy = cases.make_policy(folder, SETTINGS)
    from megasd.policy import forward

    run, views = forward.run, cases.random_views(5, count=11, vocab=120)
    batch, credit = cases.batch_and_credit(views, seed=1, device="cuda")

    def without_waiting(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for again in (False, True):
        if again:
            monkeypatch.setattr(forward, "run", without_waiting)
        policy.score(views, cases.offsets_of(views))
        loss = cases.PlainLoss()
        done = policy.update(views, cases.offsets_of(views), batch, credit, loss, minibatch=0)
        assert done.outcome == "stepped"


def test_layers_that_add_to_the_float32_buffer_themselves_learn_the_same(
    folder: Path, one_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for bfloat16, to which nothing is rounded on its way."""
    if not one_rank.transformer_engine:
        pytest.skip("Megatron's local layers do so with apex only")
    from megasd.policy.megatron import build
    from megasd.testing.ranks import forget_model_parallel

    (fused, *_) = cases.steps_and_gradients(folder, SETTINGS)
    forget_model_parallel()
    config, plain = build.TransformerConfig, {"gradient_accumulation_fusion": False}
    monkeypatch.setattr(build, "TransformerConfig", lambda **given: config(**{**given, **plain}))
    (apart, *_) = cases.steps_and_gradients(folder, SETTINGS)
    for name, gradient in apart["gradients"].items():
        difference = (fused["gradients"][name] - gradient).norm() / gradient.norm()
        assert difference < 2e-2, name
