"""What ranks run for the tests of float8 passes: layers of a CPU, which see the switch and obey in
nothing but their padding.
"""

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megasd.testing.ranks import forget_model_parallel
from tests.distributed import policy_cases as cases


def passes(folder: Path, settings: Mapping[str, Any], fp8: Mapping[str, Any] | None) -> dict:
    """Scores, then an update; what was switched on in each, and what the layers were given."""
    forget_model_parallel()
    policy = cases.make_policy(folder, settings)
    from megasd.policy.config import FP8Config

    gpt, seen = policy.state.gpt, []
    kept = gpt.decoder.layers[0].self_attention.linear_proj
    if fp8 is not None:
        policy.state = replace(policy.state, fp8=FP8Config(**fp8))
    for layer in gpt.modules():
        if isinstance(layer, type(kept)):
            layer._fp8_workspaces = {}

    def look(_: Any, given: tuple, named: Mapping[str, Any]) -> None:
        kept._fp8_workspaces["weight"] = "a copy"
        rows = named["hidden_states"].shape[0]
        seen.append({"fp8": gpt.config.fp8, "rows": rows, "experts": []})

    def count(_: Any, given: tuple) -> None:
        seen[-1]["experts"] += given[1].tolist()

    gpt.decoder.register_forward_pre_hook(look, with_kwargs=True)
    for layer in gpt.decoder.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(count)
    views = cases.random_views(5, count=11, vocab=100)
    offsets = cases.offsets_of(views)
    batch, credit = cases.batch_and_credit(views, seed=1)
    with _layers_of_transformer_engine(type(kept)):
        scores, scored = policy.score(views, offsets), [*seen]
        seen.clear()
        done = policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    return {
        "logprobs": scores.logprobs.numpy(),
        "metrics": done.metrics,
        "score": scored,
        "train": seen,
        "left": (gpt.config.fp8, gpt.config.moe_router_padding_for_quantization),
        "copies": kept._fp8_workspaces,
    }


@contextmanager
def _layers_of_transformer_engine(layer: type) -> Iterator[None]:
    """Whose copies of weights are forgotten: those of `layer`."""
    name = "transformer_engine.pytorch.module.base"
    module: Any = types.ModuleType(name)
    module.TransformerEngineBaseModule = layer
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def a_pass_that_fails(folder: Path) -> Any:
    """`config.fp8` after a forward pass in float8 raised."""
    policy = cases.make_policy(folder, {})
    from megasd.policy.config import FP8Config

    gpt = policy.state.gpt
    policy.state = replace(policy.state, fp8=FP8Config())
    gpt.decoder.forward = None  # pyright: ignore[reportAttributeAccessIssue]
    views = cases.random_views(5, count=2, vocab=100)
    with _layers_of_transformer_engine(torch.nn.Bilinear), pytest.raises(TypeError):
        policy.score(views, cases.offsets_of(views))
    return gpt.config.fp8
