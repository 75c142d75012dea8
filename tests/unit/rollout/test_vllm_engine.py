"""The trainer's side of the vLLM engine, against a process that only plays one."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megasd.process import interrupt
from megasd.rollout.config import VLLMConfig
from megasd.rollout.engine import EngineLostError, Request
from megasd.rollout.vllm import link
from megasd.rollout.vllm.engine import VLLMEngine
from megasd.rollout.vllm.link import engine_environment
from megasd.types import Prompt
from megasd.weights.bucket import Bucket

SHAPES = {"a.weight": (4, 3), "b.weight": (5,)}
CPU = torch.device("cpu")


def buckets() -> Iterator[Bucket]:
    memory = torch.arange(12.0)
    for name, shape in SHAPES.items():
        yield Bucket.over(memory, {name: shape})


def requests() -> list[Request]:
    prompts = [
        Prompt(index=i, messages=(), token_ids=np.array([i, i + 1, 9]), where=f"p.jsonl:{i}")
        for i in range(3)
    ]
    return [
        Request(
            prompt=prompt,
            group_id=0,
            sample=4,
            seed=0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_response_tokens=2,
        )
        for prompt in prompts
    ]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`make(behaviour)`: an engine whose process is tests/unit/fake_engine.py."""
    (tmp_path / "generation_config.json").write_text("{}")  # of a model: only its tokenizer ends
    monkeypatch.setattr(link, "COMMAND", (sys.executable, "-m", "tests.unit.fake_engine"))
    tokenizer: Any = SimpleNamespace(eos_token_id=1, decode=lambda ids, **_: f"{ids}")
    engines: list[VLLMEngine] = []

    def make_one(behaviour: str = "", timeout: int = 60) -> VLLMEngine:
        options: dict[str, Any] = {"behaviour": behaviour}
        engine = VLLMEngine(
            VLLMConfig(options=options, timeout_seconds=timeout, start_timeout_seconds=60),
            tmp_path,
            tokenizer,
            dtype=torch.float32,
            device=CPU,
            hf_shapes=SHAPES,
            max_tokens=8,
            run_folder=tmp_path,
            name="engine7",
        )
        engines.append(engine)
        return engine

    yield make_one
    for engine in engines:
        engine.close()


def test_responses_of_other_versions_incarnations_or_calls_are_counted_never_mixed_up(
    make: Any,
) -> None:
    engine = make("answers for others too")
    engine.load_weights(buckets(), 5)
    rollouts = engine.generate(requests())
    assert [rollout.token_ids.tolist() for rollout in rollouts] == [[0, 1], [1, 2], [2, 3]]
    assert {rollout.policy_version for rollout in rollouts} == {5}
    metrics = engine.metrics()
    assert metrics["engine/stale"] == 9
    assert metrics["engine/queue_max"] == 4
    assert metrics["engine/cache_max"] == 0.5


@pytest.mark.parametrize("behaviour", ["stops", "works for ever"])
def test_a_process_without_a_sign_of_life_is_replaced_and_its_debts_are_named(
    make: Any, behaviour: str
) -> None:
    """One is stopped and one hangs in a step while its heart beats."""
    engine = make(behaviour, timeout=2)
    engine.load_weights(buckets(), 5)
    pid = engine.pid
    with pytest.raises(EngineLostError, match=r"engine7 .*no sign of life for 2 s") as lost:
        engine.generate(requests())
    assert "p.jsonl:1 sample 4, p.jsonl:2 sample 4" in str(lost.value)
    assert lost.value.missing == [1, 2]
    assert [rollout.prompt.index for rollout in lost.value.rollouts] == [0]
    assert not link._alive(pid)
    engine.load_weights(buckets(), 6)
    (rollout,) = engine.generate(requests()[2:])
    assert rollout.policy_version == 6
    assert engine.metrics()["engine/restarts"] == 1


def test_who_is_asked_to_stop_does_not_wait_for_an_engine_that_samples(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make("works for ever")
    engine.load_weights(buckets(), 5)
    monkeypatch.setattr(interrupt, "_state", interrupt._State())
    threading.Timer(0.1, setattr, (interrupt._state, "asked", signal.SIGTERM)).start()
    with pytest.raises(interrupt.StopError):
        engine.generate(requests())
    assert link._alive(engine.pid), "it is no failure of the engine's"


def test_a_process_that_does_not_start_is_an_error_with_the_end_of_its_log(make: Any) -> None:
    engine = make("does not start")
    walked = []

    def all_buckets() -> Iterator[Bucket]:
        yield from buckets()
        walked.append("to the end")

    with pytest.raises(RuntimeError, match="exited with code 3") as error:
        engine.load_weights(all_buckets(), 1)
    assert not isinstance(error.value, EngineLostError), "another try would not help"
    assert "vllm is not in the mood" in str(error.value)
    assert walked == ["to the end"]


def test_a_flipped_bit_discards_the_process_and_names_the_tensor(make: Any) -> None:
    engine = make()

    def flip(bucket: Bucket) -> None:
        if "b.weight" in bucket.tensors:
            bucket.flat.view(torch.uint8)[7] ^= 64

    engine.tamper = flip
    with pytest.raises(EngineLostError, match=r"b.weight arrived at worker 0 with another check"):
        engine.load_weights(buckets(), 1)
    assert engine.pid is None
    engine.load_weights(buckets(), 1, check=False)  # nobody compares
    engine.tamper = None
    engine.load_weights(buckets(), 2)
    assert engine.generate(requests())[0].policy_version == 2


def test_a_process_that_dies_while_weights_travel_is_replaced_after_the_walk(make: Any) -> None:
    engine = make()
    engine.load_weights(buckets(), 1)
    walked = []

    def all_buckets() -> Iterator[Bucket]:
        yield from buckets()
        walked.append("to the end")

    def kill(bucket: Bucket) -> None:
        if engine.pid is not None and "a.weight" in bucket.tensors:
            os.kill(engine.pid, signal.SIGKILL)
            while link._alive(engine.pid):
                time.sleep(0.01)

    engine.tamper = kill
    with pytest.raises(EngineLostError, match="version 2: its process was killed by SIGKILL"):
        engine.load_weights(all_buckets(), 2)
    assert walked == ["to the end"]
    engine.tamper = None
    engine.load_weights(buckets(), 2)
    assert engine.generate(requests())[0].policy_version == 2


def test_logprobs_that_are_not_finite_are_an_error(make: Any) -> None:
    engine = make("not a number")
    engine.load_weights(buckets(), 3)
    with pytest.raises(RuntimeError, match="version 3 give log-probs that are not finite"):
        engine.generate(requests())


def test_an_engine_ends_with_its_trainer(make: Any) -> None:
    engine = make()
    engine.load_weights(buckets(), 1)
    pid = engine.pid
    link.hang_up(engine._link._connection)
    for _ in range(100):
        if not link._alive(pid):
            return
        time.sleep(0.05)
    raise AssertionError("it goes on")


def test_nothing_that_names_a_trainer_rank_leaks_into_an_engine() -> None:
    base = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "LOCAL_RANK": "3", "PATH": "/bin"}
    base |= {"SLURM_PROCID": "3", "TORCHELASTIC_RUN_ID": "x", "HF_HOME": "/models"}
    base |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # the trainer's tensor parallelism wants it
    environment = engine_environment(base, {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert environment["PATH"] == "/bin"
    assert environment["HF_HOME"] == "/models"
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK", "SLURM_PROCID"} & {*environment}
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment


def test_ranks_that_feed_an_engine_are_one_or_as_many_as_its_workers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 trainer ranks cannot feed an engine of 2 workers"):
        VLLMEngine(
            VLLMConfig(tensor=2),
            tmp_path,
            SimpleNamespace(eos_token_id=1),  # type: ignore[arg-type]
            dtype=torch.float32,
            device=CPU,
            hf_shapes=SHAPES,
            max_tokens=8,
            run_folder=tmp_path,
            name="engine0",
            engine_size=3,
        )
