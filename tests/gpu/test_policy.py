"""The policy on a GPU: the cuda backend, Transformer Engine when it is installed, nccl."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from tests.distributed import policy_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


SIZES: dict[str, Any] = {
    "vocab": 128,
    "hidden": 256,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 512,
    "norm_spread": 0.2,
    "tie": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64, as the fused attention kernels want them."""
    return tiny_qwen3(tmp_path_factory.mktemp("model"), head_dim=64, **SIZES)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped GEMM under Transformer Engine, expert by expert without it."""
    path = tmp_path_factory.mktemp("experts")
    return tiny_qwen3_moe(path, head_dim=64, experts=8, moe_intermediate=128, **SIZES)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("model", ["folder", "experts", "llama"])
def test_bfloat16_on_a_gpu_scores_as_transformers_does_and_learns(
    model: str, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(model)
    policy = cases.make_policy(folder, {"dtype": "bfloat16", "device": "cuda", "max_tokens": 200})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    views = cases.random_views(5, count=11, vocab=120)
    offsets = cases.offsets_of(views)
    scores = policy.score(views, offsets)
    expected = []
    with torch.no_grad():
        for view in views:
            ids = torch.from_numpy(np.concatenate([view.prompt_ids, view.response_ids]))
            table = theirs(ids[None]).logits[0].log_softmax(-1)[len(view.prompt_ids) - 1 : -1]
            expected.append(table.gather(1, torch.from_numpy(view.response_ids)[:, None])[:, 0])
    difference = (scores.logprobs.cpu() - torch.cat(expected)).abs()
    # Where two experts are nearly as probable, bfloat16 may choose another than float32.
    assert difference.median() < 0.02, "bfloat16 against float32"
    assert difference.mean() < (0.05 if model == "experts" else 0.02)

    batch, credit = cases.batch_and_credit(views, seed=1, device="cuda")
    losses = [
        policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
        for _ in range(5)
    ]
    assert losses[-1].metrics["loss"] < losses[0].metrics["loss"]
    assert not any(done.skipped for done in losses)


def test_experts_are_one_grouped_gemm_and_load_and_leave_as_they_came(
    experts: Path, one_rank: Any
) -> None:
    from safetensors.torch import load_file

    from megasd.weights.bucket import named_tensors

    policy = cases.make_policy(experts, {"dtype": "bfloat16", "device": "cuda"})
    grouped = "decoder.layers.1.mlp.experts.linear_fc2.weight7" in policy.parameters
    assert grouped == one_rank.transformer_engine
    expected = load_file(experts / "model.safetensors")
    found = {
        name: tensor.cpu() for name, tensor in named_tensors(policy.weight_buckets(whole=True))
    }
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


@pytest.mark.usefixtures("one_rank")
def test_every_method_trains_on_a_gpu(folder: Path) -> None:
    """Every kind of pass: top-k, ids, samples, hidden states, several roles, two mini-batches."""
    from tests.distributed import methods_cases
    from tests.distributed.test_methods import methods

    settings = {"device": "cuda", "dtype": "bfloat16", "max_tokens": 200}
    for name, steps in methods_cases.train_methods(folder, settings, methods()).items():
        assert np.isfinite(steps).all(), name
        assert all(norm > 0 for _, norm in steps), name


@pytest.mark.usefixtures("one_rank")
def test_a_trainers_memory_is_lent_and_comes_back_to_the_bit(experts: Path) -> None:
    """Gradients, masters, moments and a kept teacher leave the GPU, and steps go on."""
    from megasd.policy.parking import optimizer_state

    settings = {"dtype": "bfloat16", "device": "cuda", "max_tokens": 200, "parks": True}
    policy = cases.make_policy(experts, {**settings, "teacher": {"weights": "frozen"}})
    views = cases.random_views(5, count=11, vocab=120)
    batch, credit = cases.batch_and_credit(views, seed=1, device="cuda")
    for _ in range(2):
        offsets, loss = cases.offsets_of(views), cases.PlainLoss()
        done = policy.update(views, offsets, batch, credit, loss, minibatch=0)
        assert done.outcome == "stepped"
        state = [*optimizer_state(policy.state), *policy.teacher.kept]
        bits = [tensor.cpu() for tensor in state]
        before = torch.cuda.memory_allocated()
        policy.park()
        freed = before - torch.cuda.memory_allocated()
        # 4 bytes of a gradient, 12 of the optimizer, 2 of the teacher.
        assert freed >= 18 * sum(p.numel() for p in policy.parameters.values())
        policy.unpark()
        assert torch.cuda.memory_allocated() == before
        assert all(torch.equal(*pair) for pair in zip(bits, (t.cpu() for t in state), strict=True))


@pytest.mark.usefixtures("one_rank")
def test_a_kept_teacher_takes_the_policys_place_without_memory(folder: Path) -> None:
    settings = {"dtype": "bfloat16", "device": "cuda", "teacher": {"weights": "frozen"}}
    policy = cases.make_policy(folder, settings)
    before = torch.cuda.memory_allocated()
    with policy.teacher.swapped_in():
        assert torch.cuda.memory_allocated() == before
