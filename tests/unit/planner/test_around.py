"""What a run takes beside its GPUs: bytes that the files and objects have, deadlines that hold."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasd.planner.around import OBJECT_BYTES, Around, checkpoint_bytes
from megasd.planner.command import make_plan
from megasd.planner.report import as_text
from megasd.types import Prompt, Rollout

RLSD = str(Path(__file__).parents[3] / "configs" / "jobs" / "rlsd_8b_1node.yaml")
PARAMETERS = 8_190_735_360


def around(*items: str, gpus: str = "H200:8", **options: Any) -> Around:
    found = make_plan([RLSD, *items], gpus=gpus, suggest=False, **options).around
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("teacher", "of_a_parameter"), [("live", 14), ("snapshot", 16), ("frozen", 16), ("ema", 18)]
)
def test_a_checkpoint_holds_weights_optimizer_and_teacher(
    teacher: str, of_a_parameter: int
) -> None:
    """bfloat16, a float32 copy and two moments; the teacher's in bfloat16, an average in float32"""
    plan = make_plan([RLSD, f"teacher.weights={teacher}"], gpus="H200:8", suggest=False)
    assert checkpoint_bytes(plan.scenario) == PARAMETERS * of_a_parameter
    assert plan.around is not None
    assert plan.around.kept_bytes == 3 * PARAMETERS * of_a_parameter  # checkpoint.keep: 2
    # One node of 1 GB/s; eight ranks copy a share each, and two of them (TP2) all the weights.
    assert plan.around.writing_seconds == pytest.approx(PARAMETERS * of_a_parameter / 1e9)
    copied = plan.around.host_bytes - 8 * plan.around.rollout_bytes
    assert copied == pytest.approx(PARAMETERS * of_a_parameter, rel=0.01)


def test_what_is_parked_takes_the_hosts_memory_but_for_gradients() -> None:
    """Of each of eight ranks: its part of the optimizer, and what is kept of a teacher."""
    more = around("rollout.vllm.park_trainer=true").host_bytes - around().host_bytes
    memory = make_plan([RLSD], gpus="H200:8", suggest=False).memory
    assert memory is not None
    assert more == 8 * (memory.optimizer + memory.teacher)


def test_a_rollout_as_an_object_takes_what_is_counted_for_its_tokens() -> None:
    prompt = Prompt(index=0, messages=(), token_ids=np.arange(8))
    rollout = Rollout(
        prompt=prompt,
        group_id=0,
        sample=0,
        token_ids=np.arange(4000, dtype=np.int32),
        logprobs=np.zeros(4000, np.float32),
        text="a b" * 4000 + "a" * 2000,  # 3.5 characters of a token
        finish_reason="stop",
        policy_version=0,
    )
    assert len(pickle.dumps(rollout)) / 4000 == pytest.approx(OBJECT_BYTES, rel=0.05)
    tokens = 2048 * 4096  # of a mean step
    assert around().rollout_bytes == pytest.approx(tokens * OBJECT_BYTES)


def test_the_whole_run_is_its_steps_and_the_pauses_of_its_checkpoints() -> None:
    plan = make_plan(
        [RLSD, "run.steps=100", "checkpoint.minutes=null"], gpus="H200:8", suggest=False
    )
    assert plan.duration is not None
    assert plan.around is not None
    pauses = 100 / 20 * plan.around.pausing_seconds
    assert plan.around.run_seconds == pytest.approx(100 * plan.duration.total + pauses)
    assert "100 steps take" in as_text(plan)


def test_a_deadline_that_a_step_outlasts_is_said_with_what_to_set() -> None:
    assert around().warnings == []
    (said,) = around("parallel.timeout_seconds=60").warnings
    assert said.startswith("parallel.timeout_seconds: at full length a pass over the batch takes")
    enough = math.ceil(float(said.rpartition(" ")[2]))
    assert around(f"parallel.timeout_seconds={enough}").warnings == []
    (said,) = around("watchdog.slow_seconds=600").warnings
    assert said.startswith("watchdog.slow_seconds: at full length a step takes 1,")
    (said,) = around("watchdog.factor=1.1").warnings
    assert said.startswith("watchdog.factor: ")
    assert around("watchdog.factor=0", "watchdog.slow_seconds=600").warnings == []
    (said,) = around(assume=["storage_gb=0.01"]).warnings
    assert said.startswith("checkpoint.every: writing a checkpoint takes 3.6 h")


def test_more_nodes_write_and_copy_less_each() -> None:
    one, four = around(), around(gpus="H200:32")
    assert four.writing_seconds == pytest.approx(one.writing_seconds / 4)
    assert four.host_bytes < one.host_bytes
    assert four.checkpoint_bytes == one.checkpoint_bytes
    assert dataclasses.asdict(four).keys() == dataclasses.asdict(one).keys()
