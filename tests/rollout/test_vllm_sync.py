"""From a trainer of TP2 x PP2 into real vLLM, step after step: nothing is lost on the way."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasd.testing.ranks import Ranks
from tests.rollout import vllm_sync_cases as cases
from tests.rollout.fresh_engine import answer
from tests.rollout.nursery import Nursling
from tests.rollout.vllm_models import make_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]

CUTS: dict[str, dict[str, Any]] = {
    "dense": {"tensor": 2, "pipeline": 2, "max_tokens": 400},
    "moe": {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2, "max_tokens": 400},
}


@pytest.fixture
def trainer() -> Iterator[Ranks]:
    ranks = Ranks(4, timeout_seconds=400)
    yield ranks
    ranks.close()


def fresh_answers(folder: Path, folders: list[Path], nursery: str) -> list[Any]:
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    out, log = folder / "fresh.json", folder / "fresh.log"
    process = Nursling(nursery, answer, (out, folders), log=log, environment=environment)
    assert process.wait() == 0, log.read_text()
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_engines_fed_in_place_equal_fresh_ones_and_a_killed_one_comes_back(
    kind: str, trainer: Ranks, tmp_path: Path, nursery: str
) -> None:
    (folder,) = make_models(kind, tmp_path, 1)
    given = (folder, tmp_path, CUTS[kind], nursery)
    results = trainer.run(cases.train_and_sample, *given, world_size=4)
    exports = [tmp_path / f"step{step}" for step in range(cases.STEPS)]
    fresh = fresh_answers(tmp_path, exports, nursery)
    assert fresh[0] != fresh[1] != fresh[2]
    for owner in cases.OWNERS:
        workers = cases.SEATS[owner].size
        for step, (ours, theirs) in enumerate(zip(results[owner][:-1], fresh, strict=True)):
            for prompt, ((ids, logprobs, version), (fresh_ids, fresh_logprobs)) in enumerate(
                zip(ours, theirs, strict=True)
            ):
                where = f"{workers} workers, step {step}, prompt {prompt}"
                assert ids == fresh_ids, where
                assert version == step + 1, where
                np.testing.assert_allclose(
                    logprobs, fresh_logprobs, rtol=0, atol=2e-5, err_msg=where
                )
    for result in results:
        after = result[-1]
        assert after["in order"]
        assert after["versions"] == {cases.STEPS}
        assert after["metrics"]["engine/restarts"] == 1
        assert after["metrics"]["engine/probe_gap"] < 2e-5
