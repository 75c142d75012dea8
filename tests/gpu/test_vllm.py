"""vLLM on a GPU: weights through shared memory (ipc), over nccl, and as float8. Not yet run."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from megasd.rollout.config import VLLMConfig
from megasd.rollout.engine import EngineLostError
from megasd.rollout.vllm.engine import VLLMEngine
from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.types import Rollout
from megasd.weights.bucket import Bucket
from tests.rollout.vllm_models import greedy_requests, prompts, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]

SIZES: dict[str, Any] = {
    "hidden": 256,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate": 512,
    "norm_spread": 0.2,
    "init_scale": 0.1,
}


def make_models(kind: str, root: Path) -> list[Path]:
    def make(seed: int) -> Path:
        folder = root / f"{kind}{seed}"
        if kind == "dense":
            return tiny_qwen3(folder, seed=seed, **SIZES)
        return tiny_qwen3_moe(folder, seed=seed, moe_intermediate=128, **SIZES)

    return [make(seed) for seed in range(2)]


def buckets_of(folder: Path) -> Iterator[Bucket]:
    """Bfloat16, on the GPU, over one piece of memory."""
    weights = {name: tensor.bfloat16().cuda() for name, tensor in weights_of(folder).items()}
    memory = torch.empty(
        max(tensor.numel() for tensor in weights.values()), dtype=torch.bfloat16, device="cuda"
    )
    for name, tensor in weights.items():
        bucket = Bucket.over(memory, {name: tuple(tensor.shape)})
        bucket.tensors[name].copy_(tensor)
        yield bucket


def make_engine(folder: Path, run_folder: Path, group: Any = None, **options: Any) -> VLLMEngine:
    """Fed by this process, or by each rank of `group` from its own GPU."""
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    settings: dict[str, Any] = {"kv_cache_gib": 1.0, "max_sequences": 64, "timeout_seconds": 120}
    return VLLMEngine(
        VLLMConfig(**settings | options),
        folder,
        AutoTokenizer.from_pretrained(folder),
        dtype=torch.bfloat16,
        device=torch.device("cuda", rank),
        hf_shapes={name: tuple(tensor.shape) for name, tensor in weights_of(folder).items()},
        max_tokens=512,
        run_folder=run_folder,
        name="engine0",
        rank_in_engine=rank,
        engine_size=ranks,
        group=group,
    )


@torch.no_grad()
def gaps(folder: Path, rollouts: list[Rollout]) -> np.ndarray:
    """|log-prob of the engine - log-prob of transformers in float32| of every sampled token."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda")
    found = []
    for rollout in rollouts:
        ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids]))
        table = model(ids[None].cuda()).logits[0].log_softmax(-1).cpu()
        table = table[len(rollout.prompt.token_ids) - 1 : -1]
        expected = table.gather(1, torch.from_numpy(rollout.token_ids)[:, None])[:, 0].numpy()
        assert rollout.logprobs is not None
        found.append(np.abs(rollout.logprobs - expected))
    return np.concatenate(found)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_shared_memory_feeds_an_engine_that_slept(kind: str, tmp_path: Path) -> None:
    folders = make_models(kind, tmp_path)
    engine = make_engine(folders[0], tmp_path)
    free = []
    try:
        for version, folder in enumerate([*folders, folders[0]]):
            engine.load_weights(buckets_of(folder), version)
            rollouts = engine.generate(greedy_requests())
            assert len(rollouts) == len(prompts())
            assert gaps(folder, rollouts).mean() < 0.05
            torch.cuda.empty_cache()
            awake = torch.cuda.mem_get_info()[0]
            free.append(awake)
            engine.sleep()
            asleep = torch.cuda.mem_get_info()[0]
            assert asleep - awake > 0.9 * 2**30, "the cache's memory is back"
            # The trainer takes it and torch keeps it: the next update has to get it back.
            kept = torch.empty(asleep - 2**29, dtype=torch.uint8, device="cuda")
            del kept
            assert torch.cuda.mem_get_info()[0] < 2**30
            with pytest.raises(RuntimeError, match="no complete weights"):
                engine.generate(greedy_requests())
        assert min(free) > free[0] - 2**26, "an update leaves nothing behind in the worker"

        def flip(bucket: Bucket) -> None:
            if "model.norm.weight" in bucket.tensors:
                bucket.flat[3] += 1

        engine.tamper = flip
        with pytest.raises(EngineLostError, match=r"model\.norm\.weight arrived at worker 0"):
            engine.load_weights(buckets_of(folders[0]), 9)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_float8_weights_sample_close_to_their_originals(kind: str, tmp_path: Path) -> None:
    """Experts too, whose router stays in bfloat16."""
    folders = make_models(kind, tmp_path)
    engine = make_engine(folders[0], tmp_path, quantization="fp8")
    try:
        for version, folder in enumerate(folders):
            engine.load_weights(buckets_of(folder), version)
            right = gaps(folder, engine.generate(greedy_requests())).mean()
            wrong = gaps(folders[1 - version], engine.generate(greedy_requests())).mean()
            assert right < 0.3 < wrong
    finally:
        engine.close()


def start_agent(run_folder: Path, gpus: str) -> subprocess.Popen[bytes]:
    arguments = ["--listen", "127.0.0.1:0", "--folder", str(run_folder / "engines")]
    return subprocess.Popen(
        [sys.executable, "-m", "megasd.rollout.vllm.host", *arguments, "--name", "engine0"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus},
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_feeds_an_engine_on_another_gpu(tmp_path: Path) -> None:
    folders = make_models("moe", tmp_path)
    agent = start_agent(tmp_path, "1")
    engine = make_engine(folders[0], tmp_path, placement="server")
    try:
        for version, folder in enumerate(folders):
            engine.load_weights(buckets_of(folder), version)
            assert gaps(folder, engine.generate(greedy_requests())).mean() < 0.05

        def kill(bucket: Bucket) -> None:
            if engine.pid is not None and "model.norm.weight" in bucket.tensors:
                os.killpg(engine.pid, signal.SIGKILL)

        engine.tamper = kill
        with pytest.raises(EngineLostError, match="version 7"):
            engine.load_weights(buckets_of(folders[0]), 7)
        engine.tamper = None
        engine.load_weights(buckets_of(folders[1]), 8)  # nothing has ended this process meanwhile
        assert gaps(folders[1], engine.generate(greedy_requests())).mean() < 0.05
    finally:
        engine.close()
        agent.terminate()
        agent.wait()


def feed_shared_experts(folders: list[Path], run_folder: Path) -> None:
    """Of two ranks: each sends one worker its half of the four experts, and all else."""
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    group = dist.new_group([0, 1], backend="gloo", timeout=timedelta(seconds=600))
    options = {"placement": "server", "tensor": 2, "expert_parallel": True}
    engine = make_engine(folders[0], run_folder, group, **options)
    others = [f".experts.{expert}." for expert in range(4) if expert // 2 != rank]
    try:
        for version, folder in enumerate(folders):
            mine = (
                bucket
                for bucket in buckets_of(folder)
                if not any(expert in name for name in bucket.tensors for expert in others)
            )
            engine.load_weights(mine, version)
            if rank == 0:
                assert gaps(folder, engine.generate(greedy_requests())).mean() < 0.05
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_feed_workers_that_share_experts_by_nccl(tmp_path: Path) -> None:
    """Each worker runs on the GPU of the other's rank: NCCL wants two GPUs for two ends."""
    folders = make_models("moe", tmp_path)
    agent = start_agent(tmp_path, "1,0")
    ranks = Ranks(size=2, timeout_seconds=600)
    try:
        ranks.run(feed_shared_experts, folders, tmp_path, world_size=2)
    finally:
        ranks.close()
        agent.terminate()
        agent.wait()
