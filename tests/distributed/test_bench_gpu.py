"""tools/bench_gpu.py on a CPU: what it would run on a GPU, at small sizes. Figures mean nothing."""

from pathlib import Path

import bench_gpu
import pytest

from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3


def test_the_passes_of_a_slice_are_measured(tmp_path: Path, ranks: Ranks) -> None:
    folder = tiny_qwen3(tmp_path, vocab=200, tie=False)
    (found,) = ranks.run(_measure, folder, world_size=1)
    assert all(found[name] > 0 for name in ("score", "update", "optimizer"))
    # Of two layers, 2 kv heads of 16 and 4 query heads; 48 of 64 tokens are responses.
    layer = 32 * 16 * (2 * 4 + 2 * 2) + 3 * 32 * 64 + 2 * 4 * 16 * 32 / 2
    flops = 6 * (64 * 2 * layer + 48 * 32 * 200)
    assert found["update_tflop"] == pytest.approx(flops / 1e12, rel=1e-3)


def _measure(folder: Path) -> dict:
    parts = bench_gpu.measure_passes(
        "cpu", folder, tokens=32, length=32, prompt=8, microbatches=2, repeats=1
    )
    return {name: value for part in parts for name, value in part.items()}
