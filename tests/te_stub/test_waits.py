"""No micro-batch of a dense model makes the host wait for the GPU; one with experts does so where
tokens travel by numbers that the router has drawn."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from megasd.testing.ranks import Ranks
from tests.distributed.test_methods import methods
from tests.te_stub import cases, waits
from tests.te_stub.cases import with_transformer_engine

SETTINGS = {"dtype": "bfloat16", "max_tokens": 200}  # some passes are of several micro-batches
LAYERS = 2


@pytest.mark.parametrize(
    ("what", "waiting"),
    [
        (lambda x: float(x.sum()), True),
        (lambda x: x[x > 0], True),
        (lambda x: x.tolist(), True),
        (lambda x: bool((x > 0).any()), True),
        (lambda x: x.nonzero(), True),
        (lambda x: torch.where(x > 0, x, 0.0).cumsum(0), False),
        (lambda x: x[torch.tensor([0, 2])], False),
    ],
)
def test_what_the_host_needs_is_noted(what: object, waiting: bool) -> None:
    found: Counter[str] = Counter()
    assert callable(what)
    with waits.counted(found):
        what(torch.arange(3.0))
    assert bool(found) == waiting, found


def test_dense_micro_batches_wait_for_nothing_whatever_the_method(
    folders: Mapping[str, Path], te: Ranks
) -> None:
    given = (cases.waits_of_passes, folders["qwen3"], SETTINGS, methods())
    ((microbatches, found),) = te.run(with_transformer_engine, *given, world_size=1)
    assert microbatches > 3 * len(methods())
    assert not found


def test_with_experts_each_layer_waits_once_in_its_forward_pass(
    folders: Mapping[str, Path], te: Ranks
) -> None:
    chosen = {"grpo": methods()["grpo"]}
    given = (cases.waits_of_passes, folders["qwen3_moe"], SETTINGS, chosen)
    ((microbatches, found),) = te.run(with_transformer_engine, *given, world_size=1)
    assert all("megatron.core.transformer.moe." in where for where in found), found
    assert found.total() == LAYERS * microbatches
