"""The processes that have Transformer Engine, and models for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from tests.te_stub import cases, stand_in


@pytest.fixture(scope="session")
def te() -> Iterator[Ranks]:
    """Two processes, spawned once: whoever imports Megatron in one gets Transformer Engine."""
    if not stand_in.is_installed():
        pytest.skip("Transformer Engine's Python is not in .venv: run tools/setup.sh")
    processes = Ranks(size=2, has_imports=False)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    same: Any = {"vocab": cases.VOCABULARY, "norm_spread": 0.2, "init_scale": 0.15}
    return {
        "qwen3": tiny_qwen3(root / "qwen3", rope_theta=50_000.0, tie=False, **same),
        "qwen3_moe": tiny_qwen3_moe(root / "moe", rope_theta=50_000.0, **same),
        "llama": tiny_llama(root / "llama", hidden=64, rope_theta=5_000.0, **same),
    }
