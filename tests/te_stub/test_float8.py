"""Float8 passes through Transformer Engine's own Python and Megatron's: what they compute, on whose
weights, what they leave, and that a run goes on from its checkpoint."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasd.policy.config import FP8Config
from megasd.policy.float8 import FORMATS, tokens_of_a_multiple
from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from tests.distributed import checkpoint_cases, policy_cases
from tests.float8 import as_an_fp8_engine
from tests.te_stub import float8_cases
from tests.te_stub.cases import with_transformer_engine

LAYERS = 3
DELAYED = {"recipe": "delayed", "score": False, "meter_every": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Heads, and halves of a feed-forward, of whole blocks."""
    root = tmp_path_factory.mktemp("models")
    same: Any = {"vocab": float8_cases.VOCABULARY, "norm_spread": 0.2, "layers": LAYERS}
    same |= {"hidden": 256, "heads": 2, "kv_heads": 1, "head_dim": 128, "tie": False}
    return {
        "qwen3": tiny_qwen3(root / "qwen3", intermediate=256, **same),
        "qwen3_moe": tiny_qwen3_moe(root / "moe", moe_intermediate=128, **same),
    }


def run(te: Ranks, case: Any, *args: Any) -> Any:
    (found,) = te.run(with_transformer_engine, case, *args, world_size=1)
    return found


@cache
def in_bfloat16(folder: Path, te: Ranks) -> dict[str, Any]:
    return run(te, float8_cases.passes, folder, {})


@pytest.mark.parametrize(
    ("model", "fp8", "kind"),
    [
        ("qwen3", {"recipe": "blockwise"}, "Float8BlockScaling, format=E4M3"),
        ("qwen3_moe", {"recipe": "blockwise"}, "Float8BlockScaling, format=E4M3"),
        ("qwen3", {"first_last_bf16": 1}, "Float8BlockScaling, format=E4M3"),
        ("qwen3_moe", {"recipe": "tensorwise", "train": False}, "CurrentScaling, format=HYBRID"),
        ("qwen3", DELAYED, "DelayedScaling, margin=0, format=HYBRID, amax_history_len=1024"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_the_passes_and_layers_that_ask_for_it_are_in_float8_and_no_other(
    model: str, fp8: dict, kind: str, folders: Mapping[str, Path], te: Ranks
) -> None:
    found = run(te, float8_cases.passes, folders[model], {"fp8": fp8})
    plain = in_bfloat16(folders[model], te)
    kept, asked = fp8.get("first_last_bf16", 0), FP8Config(**fp8)
    for recipes, is_on in zip(found["recipes"], (asked.score, asked.train), strict=True):
        assert recipes.keys() == set(range(1, LAYERS + 1))
        for number, recipe in recipes.items():
            inside = is_on and kept < number <= LAYERS - kept
            assert (recipe is not None) == inside
            assert recipe is None or kind in recipe
    assert set(found["copies"]) == {0}, "of weights that may be others in the next pass"
    distances = np.abs(found["read by both"] - plain["read by both"]).mean(axis=1)
    for distance, is_on in zip(distances, (asked.score, asked.train), strict=True):
        assert 0.01 < distance < 0.2 if is_on else distance == 0
    assert found["metrics"]["grad_norm"] == pytest.approx(plain["metrics"]["grad_norm"], rel=0.1)
    if asked.score and asked.train and asked.recipe == "blockwise":
        np.testing.assert_array_equal(*found["read by both"])


def test_blockwise_log_probs_are_those_of_an_fp8_engines_weights_and_activations(
    folders: Mapping[str, Path], te: Ranks
) -> None:
    """In float32 around them, so that nothing but float8 rounds."""
    settings = {"dtype": "float32", "fp8": {"recipe": "blockwise"}}
    ours = run(te, float8_cases.passes, folders["qwen3"], settings)["scored"]
    theirs, plain = as_an_fp8_engine(folders["qwen3"], float8_cases.views())
    assert np.abs(ours - theirs).mean() < 1e-3
    assert np.abs(theirs - plain).mean() > 0.05


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_a_teachers_float8_copies_are_its_own(
    recipe: str, folders: Mapping[str, Path], te: Ranks
) -> None:
    """Several micro-batches: all but the first of a pass read the copy that the first has made."""
    seen = run(te, float8_cases.take_turns, folders["qwen3"], {"fp8": {"recipe": recipe}})
    for name in ("student", "teacher"):
        first, again, anew = seen[name]
        np.testing.assert_array_equal(first, anew)
        np.testing.assert_array_equal(again, anew)
    assert np.abs(seen["student"][0] - seen["teacher"][0]).max() > 1e-2


def test_layers_that_are_recomputed_in_float8_learn_the_same(
    folders: Mapping[str, Path], te: Ranks
) -> None:
    kept, recomputed = (
        run(
            te,
            *(policy_cases.steps_and_gradients, folders["qwen3_moe"]),
            {**float8_cases.SETTINGS, "recompute": recompute, "fp8": {}},
        )
        for recompute in ("none", "full")
    )
    for one, other in zip(kept, recomputed, strict=True):
        assert one["metrics"] == other["metrics"]
        for name, gradient in one["gradients"].items():
            assert torch.equal(gradient, other["gradients"][name]), name


@pytest.mark.parametrize(
    ("model", "fp8"),
    [("qwen3", {"recipe": "blockwise"}), ("qwen3_moe", DELAYED)],
    ids=["blockwise", "delayed"],
)
def test_a_run_in_float8_goes_on_from_its_checkpoint_to_the_bit(
    model: str, fp8: dict, folders: Mapping[str, Path], tmp_path: Path, te: Ranks
) -> None:
    """The scales of delayed scaling too, though the last pass before it was in bfloat16."""
    settings = {**float8_cases.SETTINGS, "fp8": fp8}
    given = (folders[model], tmp_path, settings)
    whole = run(te, checkpoint_cases.save_in_the_middle, *given)
    resumed, _ = run(te, checkpoint_cases.resume, *given)
    np.testing.assert_equal(resumed, whole)


def test_the_meter_compares_the_two_precisions(folders: Mapping[str, Path], te: Ranks) -> None:
    found = run(te, float8_cases.a_metered_step, folders["qwen3"])
    assert 0.01 < found["fp8/abs_mean"] < found["fp8/abs_p99"]
    assert 0 < found["fp8/k3"] < found["fp8/abs_p99"] ** 2


def test_a_ranks_share_of_the_tokens_is_one_that_transformer_engine_gathers(te: Ranks) -> None:
    shares = {
        recipe: tokens_of_a_multiple(FP8Config(recipe=recipe), tensor=4, sequence=True) // 4
        for recipe in FORMATS
    }
    assert all(run(te, float8_cases.what_is_taken, shares).values())
    halves = {"blockwise": shares["blockwise"] // 2, "tensorwise": 4, "delayed": 4}
    assert not any(run(te, float8_cases.what_is_taken, halves).values())


def test_what_ranks_gather_in_float8_is_what_one_that_has_all_would_quantize(
    tmp_path: Path, te: Ranks
) -> None:
    """Of blocks: sequence parallelism sends bytes and scales, and changes no log-prob."""
    sizes: Any = {"hidden": 256, "heads": 2, "kv_heads": 2, "head_dim": 128, "intermediate": 256}
    folder = tiny_qwen3(tmp_path, vocab=float8_cases.VOCABULARY, norm_spread=0.2, **sizes)
    settings = {"tensor": 2, "max_tokens": 300, "fp8": {"train": False, "meter_every": 0}}
    cut, whole = (
        te.run(
            with_transformer_engine,
            *(float8_cases.passes, folder, {**settings, "sequence": is_cut}),
            world_size=2,
        )
        for is_cut in (True, False)
    )
    for one, other in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(one["scored"], other["scored"])
