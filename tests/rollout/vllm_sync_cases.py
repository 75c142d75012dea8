"""A trainer of four ranks that feeds two engines of real vLLM.

Rank 0 feeds one of one worker; ranks 2 and 3, of the other stage, each a worker of the other one.
"""

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megasd.rollout.placement import Seat
from tests.distributed import policy_cases as cases
from tests.rollout.nursery import forked_engines
from tests.rollout.vllm_models import greedy_requests, prompts, request_for

STEPS = 3
SEATS = {0: Seat(0), 2: Seat(1, 0, 2), 3: Seat(1, 1, 2)}  # rank 1 feeds nobody
OWNERS = [rank for rank, seat in SEATS.items() if seat.is_owner]


def train_and_sample(
    folder: Path, run_folder: Path, settings: Mapping[str, Any], nursery: str
) -> list[Any]:
    """After each step: what this rank's engine says of the 40 prompts, and an export.

    Then engine 0 is killed while it samples, and everything is sampled all the same.
    """
    with forked_engines(nursery):
        return _train_and_sample(folder, run_folder, settings)


def _train_and_sample(folder: Path, run_folder: Path, settings: Mapping[str, Any]) -> list[Any]:
    policy = cases.make_policy(folder, settings)
    from megasd.checkpoint.export import export_hf
    from megasd.rollout.build import _engine_group
    from megasd.rollout.config import SyncConfig, VLLMConfig
    from megasd.rollout.fleet import Fleet
    from megasd.rollout.vllm.engine import VLLMEngine

    rank = dist.get_rank()
    engine, seat, group = None, SEATS.get(rank), _engine_group(SEATS)
    if seat is not None:
        engine = VLLMEngine(
            VLLMConfig(tensor=seat.size, kv_cache_gib=0.25, max_sequences=32, timeout_seconds=300),
            folder,
            AutoTokenizer.from_pretrained(folder),
            dtype=torch.float32,
            device=torch.device("cpu"),
            hf_shapes=policy.table.hf_shapes(),
            max_tokens=512,
            run_folder=run_folder,
            name=f"engine{seat.number}",
            rank_in_engine=seat.rank,
            engine_size=seat.size,
            group=group,
        )
    probe = [prompt.token_ids for prompt in prompts()[-12:]]
    fleet = Fleet(engine, seat, len(OWNERS), SyncConfig(checksum_every=1), probe=probe)
    views = cases.random_views(1, count=11, vocab=90)
    answers = []
    try:
        for step in range(STEPS):
            batch, credit = cases.batch_and_credit(views, seed=step)
            offsets = cases.offsets_of(views)
            policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
            fleet.send(policy)
            export_hf(policy, folder, run_folder / f"step{step}", replace=False)
            if engine is not None and rank in OWNERS:
                answers.append([plain(r) for r in engine.generate(greedy_requests())])
            dist.barrier()
        answers.append(sample_through_a_kill(fleet))
    finally:
        fleet.close()
    return answers


def plain(rollout: Any) -> tuple[list[int], list[float], int]:
    return rollout.token_ids.tolist(), rollout.logprobs.tolist(), rollout.policy_version


def sample_through_a_kill(fleet: Any) -> dict[str, Any]:
    """More responses than an engine can give in the time that it has."""
    requests = [
        request_for(prompt, sample=sample, seed=100 * prompt.index + sample, max_response_tokens=60)
        for prompt in prompts()
        for sample in range(8)
    ]
    if dist.get_rank() == 0:
        pid = fleet.engine.pid
        threading.Timer(0.5, lambda: os.kill(pid, signal.SIGKILL)).start()
    rollouts = fleet.generate(requests)
    return {
        "versions": {rollout.policy_version for rollout in rollouts},
        "in order": all(
            (r.prompt.index, r.sample) == (q.prompt.index, q.sample)
            for r, q in zip(rollouts, requests, strict=True)
        ),
        "metrics": fleet.metrics(),
        "lengths": int(np.sum([len(r.token_ids) for r in rollouts])),
    }
