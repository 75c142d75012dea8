"""The stand-in's kernels, held to the float64 computations that a GPU's are (tests/gpu)."""

from megasd.testing.ranks import Ranks
from tests.gpu import te_numbers
from tests.te_stub.cases import with_transformer_engine


def test_values_and_gradients_are_those_of_float64(te: Ranks) -> None:
    """But for what bfloat16 rounds, or float8, with each recipe."""
    (found,) = te.run(with_transformer_engine, te_numbers.all_of_them, "cpu", world_size=1)
    for name, errors in found.items():
        te_numbers.check(name, errors)
