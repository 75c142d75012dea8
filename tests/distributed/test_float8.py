"""Float8 is switched on by pass, with what its kernels ask of lengths, and changes nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3_moe
from tests.distributed import float8_cases as cases

SPLIT: Any = {"tensor": 2, "sequence": True, "expert": 2, "max_tokens": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_qwen3_moe(path, vocab=121, norm_spread=0.2, init_scale=0.15)


@pytest.fixture(scope="module")
def plain(folder: Path, ranks: Ranks) -> dict:
    return ranks.run(cases.passes, *(folder, SPLIT, None), world_size=4)[0]


@pytest.mark.parametrize(
    ("fp8", "formats", "shares"),
    [
        ({"recipe": "blockwise"}, ("e4m3", "e4m3"), (128, 128)),
        ({"recipe": "tensorwise", "train": False}, ("hybrid", None), (16, 16)),
        ({"recipe": "delayed", "score": False}, (None, "hybrid"), (16, 16)),
    ],
    ids=["blockwise", "tensorwise", "delayed"],
)
def test_each_pass_is_in_its_precision_on_whole_shares_of_tokens_and_experts(
    fp8: dict, formats: tuple, shares: tuple, folder: Path, plain: dict, ranks: Ranks
) -> None:
    """The padding takes part in nothing: scores, loss and gradient are those without it."""
    for found in ranks.run(cases.passes, *(folder, SPLIT, fp8), world_size=4):
        for kind, format_, share in zip(("score", "train"), formats, shares, strict=True):
            assert {one["fp8"] for one in found[kind]} == {format_}
            assert all(one["rows"] % share == 0 for one in found[kind])
            aligned = all(n % 16 == 0 for one in found[kind] for n in one["experts"])
            assert aligned == (format_ is not None)
        assert found["left"] == (None, False)
        assert bool(found["copies"]) == (formats[1] is None), "of the last pass, if in float8"
        np.testing.assert_allclose(found["logprobs"], plain["logprobs"], atol=1e-5)
        assert found["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], abs=1e-5)
        assert found["metrics"]["grad_norm"] == pytest.approx(
            plain["metrics"]["grad_norm"], rel=1e-5
        )


def test_a_pass_that_fails_leaves_nothing_switched_on(folder: Path, ranks: Ranks) -> None:
    assert ranks.run(cases.a_pass_that_fails, folder, world_size=1) == [None]
