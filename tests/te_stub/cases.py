"""What the process with Transformer Engine's layers runs."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import methods_cases, planner_cases
from tests.distributed import policy_cases as cases
from tests.te_stub import kernels, stand_in, waits

VOCABULARY = 121


def with_transformer_engine(case: Callable[..., Any], *args: Any) -> Any:
    """A case of other tests, whose policies get Transformer Engine's layers."""
    stand_in.start()
    try:
        return case(*args)
    finally:
        stand_in.forget_groups()


def with_local_layers(case: Callable[..., Any], *args: Any) -> Any:
    """The same in the same process, with Megatron's own layers."""
    started = stand_in.start()
    from megasd.policy import backend

    backend._started = dataclasses.replace(started, transformer_engine=False)
    try:
        return case(*args)
    finally:
        backend._started = started
        stand_in.forget_groups()


def what_it_is_made_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a policy's parts, its weights as read, the kernels of a score and a step."""
    policy = cases.make_policy(folder, settings)
    weights = cases.weights_of(policy)
    views = cases.random_views(5, count=6, vocab=VOCABULARY)
    offsets = cases.offsets_of(views)
    scored = _launched(lambda: policy.score(views, offsets))
    batch, credit = cases.batch_and_credit(views, seed=1)
    learned = _launched(
        lambda: policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    )
    modules = {name: type(module).__name__ for name, module in policy.state.gpt.named_modules()}
    optimizers = {type(part.optimizer) for part in policy.state.optimizer.chained_optimizers}
    return {
        "modules": modules,
        "optimizers": {f"{kind.__module__}.{kind.__name__}" for kind in optimizers},
        "weights": weights,
        "scored": scored,
        "learned": learned,
    }


def steps_without_fusion(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`policy_cases.steps_and_gradients` of layers that leave their gradients to Megatron's DDP."""
    stand_in.start()
    from megasd.policy.megatron import build

    config = build.TransformerConfig
    with pytest.MonkeyPatch.context() as patch:
        plain = {"gradient_accumulation_fusion": False}
        patch.setattr(build, "TransformerConfig", lambda **given: config(**{**given, **plain}))
        return cases.steps_and_gradients(folder, settings)


def _launched(run: Callable[[], Any]) -> Counter[str]:
    kernels.LAUNCHED.clear()
    run()
    return kernels.LAUNCHED.copy()


def one_step_of_each_method(folder: Path, methods: Mapping[str, Any]) -> dict[str, Any]:
    methods_cases.STEPS = 1
    return methods_cases.train_methods(folder, {"eps": 1e-6, "max_tokens": 400}, methods)


def swap_teachers(folder: Path, settings: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
    """Scores of student and frozen teacher before a step and after it; the student's again."""
    policy = cases.make_policy(folder, {**settings, "teacher": {"weights": "frozen"}})
    views = cases.random_views(5, count=6, vocab=VOCABULARY)
    offsets = cases.offsets_of(views)
    batch, credit = cases.batch_and_credit(views, seed=1)
    seen: dict[str, list[np.ndarray]] = {"student": [], "teacher": []}

    def read() -> None:
        seen["student"].append(policy.score(views, offsets).logprobs.numpy())
        teacher = policy.score_teacher("teacher", views, offsets)
        seen["teacher"].append(teacher.logprobs.numpy())
        seen["student"].append(policy.score(views, offsets).logprobs.numpy())

    read()
    policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    read()
    return seen


def waits_of_passes(
    folder: Path, settings: Mapping[str, Any], methods: Mapping[str, Any]
) -> tuple[int, Counter[str]]:
    """Micro-batches of a step of each method; where they would wait for a GPU, and how often."""
    from megasd.policy import forward

    run, found, sizes = forward.run, Counter[str](), list[int]()

    def run_and_count(model: Any, microbatches: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(microbatches))
        with waits.counted(found):
            return run(model, microbatches, *args, **kwargs)

    methods_cases.STEPS = 1
    forward.run = run_and_count
    try:
        methods_cases.train_methods(folder, settings, methods)
    finally:
        forward.run = run
    return sum(sizes), found


def saved_by_forward(folder: Path, settings: Mapping[str, Any], cuts: Any) -> list[int]:
    return with_transformer_engine(planner_cases.saved_by_forward, folder, settings, cuts)


saved_by_forward.keeps_groups = True  # pyright: ignore[reportFunctionMemberAccess]
