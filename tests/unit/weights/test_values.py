"""Numbers that no weight of a model is."""

import pytest
import torch

from megasd.weights.values import strange_values


@pytest.mark.parametrize(
    ("value", "dtype", "problem"),
    [
        (float("nan"), torch.bfloat16, "holds NaN"),
        (float("-inf"), torch.float32, "holds infinity"),
        (1e30, torch.bfloat16, "holds 1e+30"),
        (-70_000.0, torch.float32, "holds -7e+04"),
        (-65_504.0, torch.float16, None),
        (0.0, torch.bfloat16, None),
    ],
)
def test_one_value_is_enough(value: float, dtype: torch.dtype, problem: str | None) -> None:
    tensor = torch.linspace(-2, 2, 35).view(5, 7).to(dtype)
    assert strange_values(tensor) is None
    tensor[3, 1] = value
    assert strange_values(tensor) == problem
