"""What a process with Transformer Engine's layers runs of float8, with or without a GPU."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megasd.types import Scores, View
from tests.distributed import policy_cases as cases

VOCABULARY = 121
SETTINGS = {"dtype": "bfloat16", "max_tokens": 60}  # several micro-batches in a pass


def views() -> list[View]:
    return cases.random_views(5, count=8, vocab=VOCABULARY)


def passes(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A score and a step: the log-probs that each read, its recipe by layer, and what is left."""
    policy = cases.make_policy(folder, {**SETTINGS, **settings})
    recipes = _recipes_by_layer(policy)
    offsets = cases.offsets_of(views())
    batch, credit = cases.batch_and_credit(views(), 1, settings.get("device", "cpu"))
    scored, in_score = _numbers(policy.score(views(), offsets)), dict(recipes)
    done = policy.update(views(), offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    assert done.logprobs is not None
    assert done.read is not None
    return {
        "scored": scored,
        "read by both": np.stack([scored, done.logprobs.cpu()])[:, done.read.cpu()],
        "metrics": done.metrics,
        "recipes": (in_score, dict(recipes)),
        "copies": [len(copies) for copies in _copies(policy)],
    }


def _numbers(scores: Scores) -> np.ndarray:
    return scores.logprobs.cpu().numpy()


def _recipes_by_layer(policy: Any) -> dict[int, str | None]:
    """Filled in by every pass: what Transformer Engine is told, None: nothing of float8."""
    told: Any = import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager
    found: dict[int, str | None] = {}

    def note(layer: Any, *_: Any) -> None:
        recipe = repr(told.get_fp8_recipe()) if told.is_fp8_enabled() else None
        found[layer.layer_number] = recipe

    for layer in policy.state.gpt.decoder.layers:
        layer.register_forward_pre_hook(note)
    return found


def take_turns(folder: Path, settings: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
    """Scores of a student that has learned and of its frozen teacher, in turns; then once more
    each, with every float8 copy dropped before it.
    """
    policy = cases.make_policy(folder, {**SETTINGS, **settings, "teacher": {"weights": "frozen"}})
    offsets = cases.offsets_of(views())
    batch, credit = cases.batch_and_credit(views(), 1, settings.get("device", "cpu"))
    read = {
        "student": lambda: policy.score(views(), offsets),
        "teacher": lambda: policy.score_teacher("teacher", views(), offsets),
    }
    read["teacher"]()
    policy.update(views(), offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    seen = {name: [] for name in read}
    for name in ("teacher", "student", "teacher", "student"):
        seen[name].append(_numbers(read[name]()))
    for name in ("teacher", "student"):
        for copies in _copies(policy):
            copies.clear()
        seen[name].append(_numbers(read[name]()))
    return seen


def _copies(policy: Any) -> Iterator[dict[str, Any]]:
    """Of the weights in float8, by layer of Transformer Engine."""
    for module in policy.state.gpt.modules():
        if hasattr(module, "_fp8_workspaces"):
            yield module._fp8_workspaces


def a_metered_step(folder: Path) -> dict[str, float]:
    policy = cases.make_policy(folder, {**SETTINGS, "fp8": {"score": False}})
    from megasd.loop.meter import Meter

    batch, _ = cases.batch_and_credit(views(), seed=1)
    return Meter(policy, seed=0).measure(cases.experience_of(views(), batch), step=0)


def what_is_taken(shares: Mapping[str, int]) -> dict[str, bool]:
    """By recipe: whether a column-parallel layer takes so many tokens as a rank's share."""
    engine: Any = import_module("transformer_engine.pytorch")
    recipes: Any = import_module("transformer_engine.common.recipe")
    made = {
        "blockwise": recipes.Float8BlockScaling(),
        "tensorwise": recipes.Float8CurrentScaling(),
        "delayed": recipes.DelayedScaling(),
    }

    def takes(recipe: str) -> bool:
        cpu = torch.device("cpu")
        state = engine.quantization.RecipeState.create(
            made[recipe], mode="forward", num_quantizers=3, device=cpu
        )
        tokens = torch.zeros(shares[recipe], 256)
        try:
            engine.utils.assert_dim_for_fp8_exec(tokens)
            engine.utils.assert_dim_for_all_gather(tokens, True, state.make_quantizers()[0])
        except AssertionError:
            return False
        return True

    return {recipe: takes(recipe) for recipe in shares}
