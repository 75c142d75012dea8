"""Checkpoints that are converted, read and written by Megatron with Transformer Engine's layers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from megasd.weights.conversion import hf_to_megatron, megatron_to_hf
from megasd.weights.layout import Sizes
from tests.distributed import convert_cases
from tests.te_stub.cases import VOCABULARY, with_transformer_engine

MAKE = {"qwen3": tiny_qwen3, "qwen3_moe": tiny_qwen3_moe, "llama": tiny_llama}


def weights_of(folder: Path) -> Mapping[str, np.ndarray]:
    return {name: t.float().numpy() for name, t in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("model", MAKE)
def test_a_converted_checkpoint_loads(model: str, tmp_path: Path, te: Ranks) -> None:
    source, other = (
        MAKE[model](tmp_path / str(seed), seed=seed, vocab=VOCABULARY, norm_spread=0.2)
        for seed in (0, 1)
    )
    hf_to_megatron(source, tmp_path / "run" / "checkpoints" / "step_000000", Sizes())
    given = (convert_cases.read_converted, other, [tmp_path / "run"], {})
    ((before, after),) = te.run(with_transformer_engine, *given, world_size=1)
    np.testing.assert_equal(before, weights_of(other))
    np.testing.assert_equal(after, weights_of(source))


@pytest.mark.parametrize("model", MAKE)
def test_a_checkpoint_of_training_converts_to_the_folder_that_is_exported(
    model: str, folders: Mapping[str, Path], tmp_path: Path, te: Ranks
) -> None:
    source = folders[model]
    given = (convert_cases.save_and_export, source, tmp_path, {"dtype": "bfloat16"})
    te.run(with_transformer_engine, *given, world_size=1)
    megatron_to_hf(tmp_path, tmp_path / "converted", source=source)
    converted, exported = (weights_of(tmp_path / name) for name in ("converted", "hf"))
    np.testing.assert_equal(converted, exported)
