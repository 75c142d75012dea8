"""What the tests of the vLLM engine share: models, buckets, engines, and an independent reading."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megasd.rollout.config import VLLMConfig
from megasd.rollout.engine import Request
from megasd.rollout.vllm.engine import VLLMEngine
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.types import Prompt, Rollout
from megasd.weights.bucket import Bucket

MODELS = {"dense": tiny_qwen3, "moe": tiny_qwen3_moe}
# Heads of 32: the smallest that vLLM's CPU attention takes. Wide weights: no ties in an argmax.
SIZES: dict[str, Any] = {"head_dim": 32, "norm_spread": 0.3, "init_scale": 0.3}


def make_models(kind: str, root: Path, count: int, **sizes: Any) -> list[Path]:
    """Folders with the same shapes and other weights."""
    return [
        MODELS[kind](root / f"{kind}{seed}", seed=seed, **SIZES | sizes) for seed in range(count)
    ]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(str(folder / "model.safetensors"))


def buckets_of(weights: Mapping[str, Tensor], elements: int = 20_000) -> Iterator[Bucket]:
    """Several buckets over one piece of memory, which is written again for each."""
    largest = max(tensor.numel() for tensor in weights.values())
    memory = torch.empty(max(elements, largest))
    names: list[str] = []
    for name in [*weights, None]:
        full = sum(weights[one].numel() for one in names)
        if name is None or (names and full + weights[name].numel() > len(memory)):
            bucket = Bucket.over(memory, {one: tuple(weights[one].shape) for one in names})
            for one, view in bucket.tensors.items():
                view.copy_(weights[one])
            yield bucket
            names = []
        if name is not None:
            names.append(name)


def make_engine(folder: Path, run_folder: Path, **options: Any) -> VLLMEngine:
    names = ("rank_in_engine", "engine_size", "group", "name")
    arguments: dict[str, Any] = {"name": "engine0"}
    arguments |= {name: options.pop(name) for name in names if name in options}
    settings: dict[str, Any] = {
        "kv_cache_gib": 0.25,
        "max_sequences": 32,
        "timeout_seconds": 60,
        "start_timeout_seconds": 300,
    }
    return VLLMEngine(
        VLLMConfig(**settings | options),
        folder,
        AutoTokenizer.from_pretrained(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        hf_shapes={name: tuple(tensor.shape) for name, tensor in weights_of(folder).items()},
        max_tokens=512,
        run_folder=run_folder,
        **arguments,
    )


@functools.cache
def prompts() -> list[Prompt]:
    """40 of them; a cache block has 128 tokens, so some have one, some two full ones."""
    draws = np.random.default_rng(0)
    lengths = [*draws.integers(3, 60, size=30), *draws.integers(130, 300, size=10)]
    return [
        Prompt(
            index=i,
            messages=(),
            token_ids=draws.integers(6, 90, size=length, dtype=np.int64),
            where=f"prompts.jsonl:{i + 1}",
        )
        for i, length in enumerate(lengths)
    ]


def request_for(prompt: Prompt, **options: Any) -> Request:
    sampling: dict[str, Any] = {
        "group_id": prompt.index,
        "sample": 0,
        "seed": prompt.index,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_response_tokens": 12,
    }
    return Request(prompt=prompt, **sampling | options)


def greedy_requests(**options: Any) -> list[Request]:
    return [request_for(prompt, temperature=0.0, **options) for prompt in prompts()]


@functools.cache
def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits_of(folder: Path, rollout: Rollout) -> Tensor:
    """[T, V] float64 before each response token, from one pass of transformers without a cache."""
    ids = np.concatenate([rollout.prompt.token_ids, rollout.token_ids])
    logits = model_of(folder)(torch.from_numpy(ids)[None], use_cache=False).logits[0]
    return logits[len(rollout.prompt.token_ids) - 1 : -1].double()


def check_greedy(folder: Path, rollouts: Sequence[Rollout], version: int) -> None:
    """Every token is the model's most likely one, every log-prob the model's within 2e-5."""
    assert len(rollouts) == len(prompts())
    for prompt, rollout in zip(prompts(), rollouts, strict=True):
        assert rollout.prompt is prompt
        assert rollout.policy_version == version
        table = logits_of(folder, rollout).log_softmax(-1)
        np.testing.assert_array_equal(table.argmax(-1).numpy(), rollout.token_ids)
        assert rollout.logprobs is not None
        assert rollout.logprobs.dtype == np.float32
        expected = table.gather(1, torch.from_numpy(rollout.token_ids)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.logprobs, expected, rtol=0, atol=2e-5)
