"""Real vLLM on a CPU: fed in place it samples what the weights say, and it comes back when lost."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megasd.rollout.engine import EngineLostError, response_text
from megasd.rollout.vllm import host
from megasd.rollout.vllm.engine import VLLMEngine
from megasd.rollout.vllm.link import _alive, hang_up
from megasd.testing.forked import Forked
from megasd.testing.ranks import Ranks
from megasd.weights.bucket import Bucket
from tests.rollout import vllm_cases
from tests.rollout.nursery import forked_engines
from tests.rollout.vllm_models import (
    buckets_of,
    check_greedy,
    greedy_requests,
    logits_of,
    make_engine,
    make_models,
    prompts,
    request_for,
    weights_of,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]


@dataclass
class Setup:
    """One engine for all tests of the dense model, which leave it with weights of `folders[0]`."""

    engine: VLLMEngine
    folders: list[Path]

    def load(self, which: int, version: int) -> None:
        self.engine.load_weights(buckets_of(weights_of(self.folders[which])), version)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, nursery: str) -> Iterator[Setup]:
    root = tmp_path_factory.mktemp("dense")
    setup = Setup.__new__(Setup)
    setup.folders = make_models("dense", root, 3)
    with forked_engines(nursery):
        setup.engine = make_engine(setup.folders[0], root)
        yield setup
        setup.engine.close()


def test_three_updates_in_place_sample_exactly_what_each_model_says(dense: Setup) -> None:
    with pytest.raises(RuntimeError, match="no complete weights"):
        dense.engine.generate(greedy_requests())
    for version in (1, 2, 0):
        dense.load(version, version)
        rollouts = dense.engine.generate(greedy_requests())
        check_greedy(dense.folders[version], rollouts, version)
        assert {rollout.token_ids.dtype for rollout in rollouts} == {np.dtype(np.int32)}
    metrics = dense.engine.metrics()
    assert metrics["engine/tokens_per_second"] > 0
    assert metrics["engine/queue_max"] > 0, "40 requests, 32 sequences at a time"
    assert metrics["engine/restarts"] == metrics["engine/stale"] == 0


def truncated(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Log-probs [V] after temperature, min-p, top-k, top-p: written with a sorted list."""
    probabilities = torch.softmax(logits / temperature, -1)
    ranked = sorted(range(len(probabilities)), key=lambda i: -probabilities[i].item())
    floor = min_p * probabilities[ranked[0]].item()
    ranked = [i for i in ranked if probabilities[i].item() >= floor][: top_k or None]
    total = sum(probabilities[i].item() for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += probabilities[i].item() / total
        if mass >= top_p:
            break
    result = torch.full_like(probabilities, -math.inf)
    result[kept] = torch.log(probabilities[kept] / probabilities[kept].sum())
    return result


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 0.0},
]


def test_logprobs_are_those_of_the_distribution_really_sampled_from(dense: Setup) -> None:
    """All ways of sampling in one batch; the same seeds give the same tokens in another batch."""
    requests = [
        request_for(prompt, **sampling) for sampling in SAMPLINGS for prompt in prompts()[:6]
    ]
    rollouts = dense.engine.generate(requests)
    for request, rollout in zip(requests, rollouts, strict=True):
        limits = (request.temperature or 1.0, request.top_k, request.top_p, request.min_p)
        table = [truncated(row, *limits) for row in logits_of(dense.folders[0], rollout)]
        expected = [row[i].item() for row, i in zip(table, rollout.token_ids, strict=True)]
        assert rollout.logprobs is not None
        np.testing.assert_allclose(rollout.logprobs, expected, rtol=0, atol=2e-5)
        assert rollout.text == response_text(dense.engine._tokenizer, rollout.token_ids)
    again = dense.engine.generate(requests[::3])
    for one, other in zip(again, rollouts[::3], strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    other_seed = dense.engine.generate([request_for(prompts()[0], seed=99)])
    assert other_seed[0].token_ids.tolist() != rollouts[0].token_ids.tolist()


def test_more_prompts_than_a_step_holds_are_read_one_after_the_other(dense: Setup) -> None:
    """6,400 tokens of seeded requests; a prompt read in parts would end an engine on a CPU."""
    draws = np.random.default_rng(1)
    long = [
        replace(prompts()[i], token_ids=draws.integers(6, 90, size=200, dtype=np.int64))
        for i in range(32)
    ]
    requests = [request_for(prompt, max_response_tokens=3) for prompt in long]
    rollouts = dense.engine.generate(requests)
    (alone,) = dense.engine.generate(requests[-1:])
    np.testing.assert_array_equal(alone.token_ids, rollouts[-1].token_ids)


def test_a_stop_string_or_stop_token_ends_a_response_with_all_sampled_tokens(
    dense: Setup,
) -> None:
    (whole,) = dense.engine.generate([request_for(prompts()[0], seed=3, max_response_tokens=40)])
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 40
    stop = whole.text[4:7]
    options: dict[str, Any] = {"seed": 3, "max_response_tokens": 40, "stop": (stop,)}
    (stopped,) = dense.engine.generate([request_for(prompts()[0], **options)])
    assert stopped.finish_reason == "stop"
    assert stop in stopped.text
    assert stop not in response_text(dense.engine._tokenizer, stopped.token_ids[:-1])
    np.testing.assert_array_equal(
        stopped.token_ids, whole.token_ids[: len(stopped.token_ids)], "the stop's own are there"
    )
    dense.engine._stop_ids.append(int(whole.token_ids[2]))
    (ended,) = dense.engine.generate([request_for(prompts()[0], seed=3)])
    dense.engine._stop_ids.pop()
    assert ended.finish_reason == "stop"
    assert ended.token_ids[-1] == whole.token_ids[2]
    assert len(ended.token_ids) <= 3


def test_scores_are_logprobs_at_temperature_one(dense: Setup) -> None:
    rollouts = dense.engine.generate([request_for(prompt) for prompt in prompts()[28:34]])
    sequences = [np.concatenate([r.prompt.token_ids, r.token_ids]) for r in rollouts]
    for rollout, scores, sequence in zip(
        rollouts, dense.engine.score(sequences), sequences, strict=True
    ):
        assert scores.shape == (len(sequence) - 1,)
        table = logits_of(dense.folders[0], rollout).log_softmax(-1)
        expected = table.gather(1, torch.from_numpy(rollout.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(
            scores[-len(rollout.token_ids) :], expected.numpy(), rtol=0, atol=2e-5
        )


def test_a_request_that_vllm_refuses_is_named_and_harms_no_other(dense: Setup) -> None:
    long = request_for(prompts()[0], max_response_tokens=0)
    with pytest.raises(ValueError, match=r"prompts.jsonl:1 sample 0: vLLM refuses"):
        dense.engine.generate([*greedy_requests(), long])
    assert len(dense.engine.generate(greedy_requests())) == 40


def test_one_byte_flipped_in_flight_is_named_and_the_engine_comes_back(dense: Setup) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"

    def flip(bucket: Bucket) -> None:
        if name in bucket.tensors:
            raw = bucket.tensors[name].view(-1).view(torch.uint8)
            raw[1234] ^= 1

    lost = dense.engine.pid
    dense.engine.tamper = flip
    with pytest.raises(EngineLostError, match=f"{name} arrived at worker 0 with another checksum"):
        dense.load(1, 5)
    dense.engine.tamper = None
    assert lost is not None
    assert not _alive(lost)
    with pytest.raises(RuntimeError, match="no complete weights"):
        dense.engine.generate(greedy_requests())
    dense.load(1, 5)
    check_greedy(dense.folders[1], dense.engine.generate(greedy_requests()), 5)


class Kills:
    """Ends the engine as soon as the first response is decoded."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.tokenizer, self.engine = engine._tokenizer, engine

    def decode(self, *args: Any, **options: Any) -> Any:
        if self.engine.pid is not None:
            os.kill(self.engine.pid, signal.SIGKILL)
        return self.tokenizer.decode(*args, **options)


def test_a_killed_engine_names_what_it_owes_and_comes_back_with_the_right_version(
    dense: Setup,
) -> None:
    engine = dense.engine
    requests = [
        request_for(prompt, temperature=0.0, max_response_tokens=2 if prompt.index < 3 else 200)
        for prompt in prompts()
    ]
    tokenizer, engine._tokenizer = engine._tokenizer, Kills(engine)  # type: ignore[assignment]
    with pytest.raises(EngineLostError, match=r"killed by SIGKILL; without a response") as lost:
        engine.generate(requests)
    engine._tokenizer = tokenizer
    missing = [requests[i] for i in lost.value.missing]
    assert {r.prompt.index for r in lost.value.rollouts} <= {0, 1, 2}
    assert len(missing) == 40 - len(lost.value.rollouts) >= 37
    assert missing[0].prompt.where in str(lost.value)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(missing)

    dense.load(2, 6)
    rest = engine.generate([request_for(r.prompt, temperature=0.0) for r in missing])
    assert [r.prompt for r in rest] == [r.prompt for r in missing]
    assert {r.policy_version for r in rest} == {6}
    assert engine.metrics()["engine/restarts"] == 2
    check_greedy(dense.folders[2], engine.generate(greedy_requests()), 6)


def test_weights_that_are_not_complete_are_an_error_in_one_sentence(dense: Setup) -> None:
    """Last of the dense tests: it leaves the engine without a process."""
    weights = weights_of(dense.folders[0])
    gone = weights.pop("model.norm.weight")
    weights["model.extra.weight"] = gone
    walked = []

    def buckets() -> Iterator[Bucket]:
        yield from buckets_of(weights)
        walked.append("to the end")

    expected = "model.extra.weight is unknown or came twice; model.norm.weight is missing"
    with pytest.raises(RuntimeError, match=expected) as error:
        dense.engine.load_weights(buckets(), 7)
    assert not isinstance(error.value, EngineLostError), "another engine would not help"
    assert walked == ["to the end"]
    assert dense.engine.pid is None


def agent_arguments(run_folder: Path, name: str) -> list[str]:
    where = ["--listen", "127.0.0.1:0", "--folder", str(run_folder / "engines")]
    return [sys.executable, "-m", "megasd.rollout.vllm.host", *where, "--name", name]


def start_agent(run_folder: Path, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(agent_arguments(run_folder, name))


def agent_of_forked_engines(arguments: list[str], nursery: str) -> None:
    sys.argv = arguments[2:]
    with forked_engines(nursery):
        host.main()


def test_an_agent_starts_ends_and_restarts_an_engine_of_another_node(tmp_path: Path) -> None:
    """Experts on one worker, over TCP; the agent is killed, then started again by the job."""
    folders = make_models("moe", tmp_path, 3)
    agent = start_agent(tmp_path, "node1")
    engine = make_engine(folders[0], tmp_path, placement="server", name="node1")
    try:
        for version, folder in enumerate(folders):
            engine.load_weights(buckets_of(weights_of(folder)), version)
            check_greedy(folder, engine.generate(greedy_requests()), version)
        secret = tmp_path / "engines" / "node1.json"
        assert secret.stat().st_mode & 0o077 == 0, "for its user only"
        engine.sleep()  # on a node of its own it need not: it has its weights still
        agent.kill()
        agent.wait()
        wait_for_end(engine)
        with pytest.raises(EngineLostError, match=r"node1\.json is gone") as lost:
            engine.generate(greedy_requests())
        assert len(lost.value.missing) == 40
        agent = start_agent(tmp_path, "node1")
        engine.load_weights(buckets_of(weights_of(folders[1])), 7)
        check_greedy(folders[1], engine.generate(greedy_requests()), 7)
        hang_up(engine._host._agent)  # type: ignore[attr-defined]
        wait_for_end(engine)
    finally:
        engine.close()
        agent.terminate()
    assert agent.wait(30) == 0
    assert not secret.exists()


def wait_for_end(engine: VLLMEngine) -> None:
    """An agent ends the engine of a trainer that left, and an engine ends with its agent."""
    assert engine.pid is not None
    for _ in range(400):
        if not _alive(engine.pid):
            return
        time.sleep(0.05)
    raise AssertionError("the engine goes on")


def test_two_workers_fed_by_one_rank(tmp_path: Path, nursery: str) -> None:
    folders = make_models("dense", tmp_path, 2, tie=False)
    with forked_engines(nursery):
        engine = make_engine(folders[0], tmp_path, tensor=2)
        try:
            for version, folder in enumerate(folders):
                engine.load_weights(buckets_of(weights_of(folder)), version)
                check_greedy(folder, engine.generate(greedy_requests()), version)
        finally:
            engine.close()


def test_each_of_two_ranks_feeds_its_own_worker_on_a_server(tmp_path: Path, nursery: str) -> None:
    """Only the first of them speaks with the agent, which serves whoever called last."""
    folders = make_models("moe", tmp_path, 2)
    agent = Forked(agent_of_forked_engines, agent_arguments(tmp_path, "engine0"), nursery)
    ranks = Ranks(size=2, timeout_seconds=300)
    try:
        errors = ranks.run(vllm_cases.feed_own_worker, folders, tmp_path, world_size=2)
    finally:
        ranks.close()
        agent.terminate()
    assert agent.wait(30) == 0
    for error in errors:
        assert len(error) == 1, "every rank hears of it"
        assert error[0].startswith("EngineLostError")
        assert "arrived at worker 1 with another checksum" in error[0]
