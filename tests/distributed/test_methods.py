"""Every method of the registry learns the same in every layout."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasd.algorithms import ALGORITHMS, load_algorithm
from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3
from tests.distributed import methods_cases as cases

# AdamW's first step divides each gradient by its own size: with its usual eps of 1e-8 a gradient
# that is nothing but rounding would be a whole step, another one in every layout.
PLAIN = {"eps": 1e-6}
LAYOUTS = {
    "TP2 DP2": {"tensor": 2, **PLAIN},
    "PP2 DP2": {"pipeline": 2, **PLAIN},
}
# Whether a method learns where no rollout has a context.
WITHOUT_CONTEXT = {
    "rlsd": True,
    "dasd": True,
    "rlcsd": False,
    "srpo": True,
    "grpo_opsd": True,
    "opsd": False,
    "sdpo": False,
    "distil": False,
}


@cache
def methods() -> dict[str, tuple[Any, dict[str, Any]]]:
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name in ALGORITHMS:
        method = load_algorithm(name)
        if name == "sft":
            continue  # sft samples nothing; its loss is the plain one of test_policy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            algorithm = method.build()
        teacher = {
            key: value
            for key, value in method.sections.get("teacher", {}).items()
            if value != "checkpoint"
        }
        found[name] = (algorithm, teacher)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd vocabulary, so that TP pads it."""
    return tiny_qwen3(
        tmp_path_factory.mktemp("model"), vocab=cases.VOCABULARY, norm_spread=0.2, init_scale=0.15
    )


@cache
def alone(folder: Path, ranks: Ranks) -> dict[str, list[tuple[float, float]]]:
    (result,) = ranks.run(cases.train_methods, folder, PLAIN, methods(), world_size=1)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_method_trains_as_on_one_process(layout: str, folder: Path, ranks: Ranks) -> None:
    expected = alone(folder, ranks)
    for rank, result in enumerate(
        ranks.run(cases.train_methods, folder, LAYOUTS[layout], methods(), world_size=4)
    ):
        for name, steps in result.items():
            np.testing.assert_allclose(
                steps, expected[name], rtol=1e-5, atol=1e-6, err_msg=f"{layout}, {rank}, {name}"
            )


def test_where_no_rollout_has_a_context_only_the_verifier_teaches(
    folder: Path, ranks: Ranks
) -> None:
    """The gradient of what needs a teacher is exactly 0; a group of equal rewards adds nothing."""
    chosen = {n: m for n, m in methods().items() if n in WITHOUT_CONTEXT}
    results = ranks.run(cases.train_without_context, folder, chosen, world_size=2)
    for result in results:
        for name, is_taught in WITHOUT_CONTEXT.items():
            assert all((norm > 0) == is_taught for _, norm in result[name]), name


def test_every_method_has_something_to_learn_here(folder: Path, ranks: Ranks) -> None:
    for name, steps in alone(folder, ranks).items():
        assert all(norm > 0 for _, norm in steps), name
