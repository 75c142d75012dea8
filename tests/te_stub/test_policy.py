"""A policy of Transformer Engine's layers: its own Python and Megatron's, kernels in torch."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megasd.testing.ranks import Ranks
from tests.distributed import checkpoint_cases, parking_cases, policy_cases
from tests.distributed.test_methods import methods
from tests.distributed.test_policy import reference
from tests.te_stub import cases
from tests.te_stub.cases import with_local_layers, with_transformer_engine

MODELS = ("qwen3", "qwen3_moe", "llama")
DENSE = {
    "input_layernorm": "IdentityOp",  # in the product after it
    "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
    "self_attention.core_attention": "TEDotProductAttention",
    "self_attention.linear_proj": "TERowParallelLinear",
}
MLP = {
    "pre_mlp_layernorm": "IdentityOp",
    "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
}
PARTS = {
    "qwen3": DENSE | MLP | {"self_attention.q_layernorm": "RMSNorm"},
    "llama": DENSE | MLP | {"self_attention.q_layernorm": "IdentityOp"},
    "qwen3_moe": DENSE
    | {
        "pre_mlp_layernorm": "RMSNorm",
        "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
        "mlp.experts.linear_fc2": "TERowParallelGroupedLinear",
    },
}


@cache
def made_of(folder: Path, te: Ranks) -> dict[str, Any]:
    (found,) = te.run(
        with_transformer_engine,
        cases.what_it_is_made_of,
        folder,
        {"dtype": "bfloat16"},
        world_size=1,
    )
    return found


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *((model, {}) for model in MODELS),
        ("qwen3", {"tensor": 2, "sequence": True}),
        ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "alone",
)
def test_it_scores_and_learns_as_hugging_face_does(
    model: str, layout: dict, folders: Mapping[str, Path], te: Ranks
) -> None:
    folder = folders[model]
    expected = reference(folder)
    given = (policy_cases.score_and_learn, folder, {"max_tokens": 60, **layout}, 5, 121)
    for ours in te.run(with_transformer_engine, *given, world_size=layout.get("tensor", 1)):
        for when in ("before", "after"):
            for name, mine, theirs in zip(
                ("logprobs", "entropy"), ours[when], expected[when], strict=False
            ):
                np.testing.assert_allclose(mine, theirs, atol=5e-6, err_msg=f"{when}: {name}")
        losses = [metrics["loss"] for metrics in ours["metrics"]]
        np.testing.assert_allclose(losses, expected["loss"], rtol=1e-5, atol=1e-6)
        norms = [metrics["grad_norm"] for metrics in ours["metrics"]]
        np.testing.assert_allclose(norms, expected["norm"], rtol=1e-5)
        assert ours["weights"].keys() == expected["weights"].keys()
        for name, theirs in expected["weights"].items():
            np.testing.assert_allclose(ours["weights"][name], theirs, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_its_layers_and_optimizer_are_transformer_engines(
    model: str, folders: Mapping[str, Path], te: Ranks
) -> None:
    found = made_of(folders[model], te)
    for name, kind in PARTS[model].items():
        assert found["modules"][f"decoder.layers.1.{name}"] == kind, name
    assert found["optimizers"] == {"transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"}


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_of_the_folder_comes_back_to_the_bit(
    model: str, folders: Mapping[str, Path], te: Ranks
) -> None:
    weights = made_of(folders[model], te)["weights"]
    expected = load_file(folders[model] / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor.bfloat16().float().numpy(), name)


def test_it_runs_the_kernels_that_it_is_fast_by(folders: Mapping[str, Path], te: Ranks) -> None:
    dense, experts = (made_of(folders[model], te) for model in ("qwen3", "qwen3_moe"))
    forward = {"fused_attn_fwd", "fused_rope_forward", "generic_gemm", "rmsnorm_fwd"}
    backward = {"fused_attn_bwd", "fused_rope_backward", "rmsnorm_bwd", "multi_tensor_adam"}
    assert forward <= dense["scored"].keys()
    assert forward | backward <= dense["learned"].keys()
    grouped = {"te_general_grouped_gemm", "permute_with_mask_map", "unpermute_with_mask_map"}
    assert grouped <= experts["scored"].keys()
    assert "convert_thd_to_bshd" not in dense["scored"], "attention without a kernel for 16 bits"


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_a_teacher_takes_its_place_and_leaves_it_to_the_bit(
    model: str, folders: Mapping[str, Path], te: Ranks
) -> None:
    given = (cases.swap_teachers, folders[model], {"dtype": "bfloat16"})
    (seen,) = te.run(with_transformer_engine, *given, world_size=1)
    first, again, after, after_again = seen["student"]
    before_step, after_step = seen["teacher"]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, before_step)
    np.testing.assert_array_equal(after, after_again)
    np.testing.assert_array_equal(before_step, after_step)
    assert np.abs(after - first).max() > 1e-2


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_recomputed_layers_learn_the_same(
    model: str, folders: Mapping[str, Path], te: Ranks
) -> None:
    """Attention in 16 bits too, whose kernel is another one than in float32."""
    kept, recomputed = (
        te.run(
            with_transformer_engine,
            *(policy_cases.steps_and_gradients, folders[model]),
            {"dtype": "bfloat16", "recompute": recompute},
            world_size=1,
        )[0]
        for recompute in ("none", "full")
    )
    for one, other in zip(kept, recomputed, strict=True):
        assert one["metrics"] == other["metrics"]
        for name, gradient in one["gradients"].items():
            assert torch.equal(gradient, other["gradients"][name]), name


def test_layers_add_their_weights_gradients_to_the_float32_buffer_themselves(
    folders: Mapping[str, Path], te: Ranks
) -> None:
    """Attention and experts; the same sums, which in bfloat16 nothing rounds on their way."""
    folder, many = folders["qwen3_moe"], {"max_tokens": 60}
    plain = (cases.steps_without_fusion, folder, many)
    (apart,) = te.run(with_transformer_engine, *plain, world_size=1)
    case = policy_cases.steps_and_gradients
    (fused,) = te.run(with_transformer_engine, case, folder, many, world_size=1)
    for one, other in zip(apart, fused, strict=True):
        for name, gradient in one["gradients"].items():
            assert torch.equal(other["gradients"][name], gradient), name
    single = {"dtype": "bfloat16", "max_tokens": 500}
    ((first, *_),) = te.run(with_transformer_engine, case, folder, single, world_size=1)
    rounded = {
        name: torch.equal(gradient, gradient.bfloat16().float())
        for name, gradient in first["gradients"].items()
        if ".layers." in name
    }
    for name, is_rounded in rounded.items():
        is_of_a_product = re.search(r"linear_\w+\.weight\d*$", name) is not None
        assert is_rounded != is_of_a_product, name


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(
    model: str, folders: Mapping[str, Path], tmp_path: Path, te: Ranks
) -> None:
    settings = {"dtype": "bfloat16", "teacher": {"weights": "ema", "decay": 0.5}}
    given = (folders[model], tmp_path, settings)
    save, resume = checkpoint_cases.save_in_the_middle, checkpoint_cases.resume
    (whole,) = te.run(with_transformer_engine, save, *given, world_size=1)
    ((resumed, _),) = te.run(with_transformer_engine, resume, *given, world_size=1)
    np.testing.assert_equal(resumed, whole)


def test_a_run_goes_on_from_a_checkpoint_before_its_first_step(
    folders: Mapping[str, Path], tmp_path: Path, te: Ranks
) -> None:
    """FusedAdam has no moments until it has stepped."""
    given = (folders["qwen3_moe"], tmp_path, {"dtype": "bfloat16"})
    save = checkpoint_cases.save_before_the_first_step
    resume = checkpoint_cases.resume_before_the_first_step
    whole = te.run(with_transformer_engine, save, *given, world_size=1)
    resumed = te.run(with_transformer_engine, resume, *given, world_size=1)
    np.testing.assert_equal(resumed, whole)


def test_fused_adams_state_is_lent_between_steps_and_comes_back_to_the_bit(
    folders: Mapping[str, Path], tmp_path: Path, te: Ranks
) -> None:
    settings = {"dtype": "bfloat16", "roles": ("reference",)}
    settings |= {"teacher": {"weights": "ema", "decay": 0.5}}
    plain, lent = (
        te.run(
            with_transformer_engine,
            parking_cases.lend_memory_between_steps,
            *(folders["qwen3_moe"], tmp_path, settings | {"parks": parks}),
            world_size=1,
        )[0]
        for parks in (False, True)
    )
    plain.pop("held")
    whole, parked, *_ = lent.pop("held")
    assert parked == dict.fromkeys(whole, 0) | {"weights": whole["weights"]}
    np.testing.assert_equal(lent, plain)


def test_every_method_trains_as_with_local_layers(folders: Mapping[str, Path], te: Ranks) -> None:
    given = (cases.one_step_of_each_method, folders["qwen3"], methods())
    (found,) = te.run(with_transformer_engine, *given, world_size=1)
    (expected,) = te.run(with_local_layers, *given, world_size=1)
    assert found.keys() == expected.keys()
    for name, steps in found.items():
        np.testing.assert_allclose(steps, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert any(norm > 0 for _, norm in steps), name
