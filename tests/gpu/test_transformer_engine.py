"""Transformer Engine's kernels against float64, module by module. Not yet run on a GPU.

The stand-in of tests/te_stub is held to the same numbers.
"""

import json
from typing import Any

import pytest
import torch

from megasd.policy.backend import float8_fault, is_transformer_engine_installed
from tests.gpu import te_numbers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not is_transformer_engine_installed(), reason="needs Transformer Engine"),
]


def report(name: str, errors: te_numbers.Errors) -> None:
    print("FIGURES " + json.dumps({f"{name}: error": float(f"{max(errors.values()):.2g}")}))
    te_numbers.check(name, errors)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", te_numbers.CASES)
def test_values_and_gradients_are_those_of_float64(name: str) -> None:
    case, _ = te_numbers.CASES[name]
    report(name, case("cuda"))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recipe", te_numbers.RECIPES)
@pytest.mark.parametrize("name", te_numbers.FLOAT8_CASES)
def test_products_in_float8_are_as_far_from_it_as_float8_rounds(name: str, recipe: Any) -> None:
    if fault := float8_fault(recipe):
        pytest.skip(fault)
    report(f"{name}, {recipe}", te_numbers.in_float8_of(name, recipe, "cuda"))
