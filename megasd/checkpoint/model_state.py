"""The policy as a sharded state dict: weights, optimizer, teacher, random states of every rank."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker

from megasd.policy.float8 import keep_scales
from megasd.policy.megatron.fixes import unshare_step
from megasd.policy.megatron.optimizer_shards import cut, pieces_of
from megasd.policy.policy import Policy
from megasd.policy.teacher import TeacherWeights

# The one format of the optimizer's state that can be cut anew for another layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(policy: Policy, *, loading: bool, random_states: bool = True) -> dict[str, Any]:
    """What `dist_checkpointing` saves, and the template of what it loads.

    `random_states`: those of every rank, which only as many ranks can load.
    """
    keep_scales(policy.state.gpt, policy.state.fp8)
    model = policy.state.gpt.sharded_state_dict()
    state: dict[str, Any] = {
        "model": model,
        "optimizer": policy.state.optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=_METADATA
        ),
        "hf_config": dict(policy.hf_config),
        "world_size": dist.get_world_size(),
        "version": policy.version,
        "skipped_steps": policy.skipped_steps,
    }
    if random_states:
        state["random"] = ShardedObject(
            "random", random_state(), (dist.get_world_size(),), (dist.get_rank(),)
        )
    if policy.teacher.kept:
        of = _whole_teacher if policy.teacher.stay else _average
        state["teacher"] = of(policy, policy.state.gpt.sharded_state_dict(), loading=loading)
    return state


def check_same_run(policy: Policy, common: Mapping[str, Any], where: str) -> None:
    """Raises ValueError when the unsharded part of a checkpoint is of another model."""
    saved, own = common["hf_config"], policy.hf_config
    # Written by every export anew, and without meaning for the weights.
    keys = (saved.keys() | own.keys()) - {"transformers_version", "dtype", "torch_dtype"}
    if differing := sorted(key for key in keys if saved.get(key) != own.get(key)):
        raise ValueError(
            f"model.path: {where} was saved from another model, its config.json differs in "
            f"{', '.join(differing)}; resume with the model of the run"
        )


def _whole_teacher(policy: Policy, model: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """The model's own description of its shards, with the teacher's values in it."""
    shards: dict[str, Any] = {}
    tensors = policy.teacher.tensors
    for name, shard in model.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if isinstance(shard, ShardedTensor):
            shards[name] = replace(shard, data=tensor, dtype=tensor.dtype)
        else:
            assert isinstance(shard, ShardedTensorFactory), f"{name}: {type(shard)}"
            shards[name] = replace(shard, data=tensor)
    missing = tensors.keys() - shards.keys()
    assert not missing, f"teacher weights without a shard: {sorted(missing)}"
    add_prefix_for_sharding(shards, "teacher.")
    return shards


def _average(policy: Policy, model: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """By parameter, what this rank keeps of the moving average: under the same names as whole
    ones, so that older checkpoints load."""
    pieces = pieces_of(model)
    shards: dict[str, Any] = {}
    for bucket, kept in zip(policy.teacher.buckets, policy.teacher.kept, strict=True):
        for name, low, high, at in bucket.own_ranges():
            values = kept[at : at + high - low]
            values = torch.empty_like(values, device="cpu") if loading else values
            shards[name] = [
                shard
                for piece, begin in pieces[id(bucket.parameters[name][0])]
                for shard in cut(piece, begin, values, low, f"teacher.{piece.key}")
            ]
    return shards


def _restore_teacher(teacher: TeacherWeights, state: Mapping[str, Any]) -> None:
    for name, tensor in teacher.tensors.items():
        tensor.copy_(state[name])
    if teacher.stay:
        return
    for bucket, kept in zip(teacher.buckets, teacher.kept, strict=True):
        for name, low, high, at in bucket.own_ranges():
            shards = [shard.flatten() for shard in state[name]]
            kept[at : at + high - low] = torch.cat(shards)


@torch.no_grad()
def restore_state(policy: Policy, state: dict[str, Any]) -> None:
    """Put a loaded state dict in place."""
    incompatible = policy.state.gpt.load_state_dict(state["model"], strict=False)
    missing = [name for name in incompatible.missing_keys if not name.endswith("_extra_state")]
    if missing or incompatible.unexpected_keys:
        raise ValueError(
            f"the checkpoint is of another model: missing {missing}, "
            f"unexpected {incompatible.unexpected_keys}"
        )
    _load_optimizer(policy.state.optimizer, state["optimizer"])
    if policy.teacher.kept:
        _restore_teacher(policy.teacher, state["teacher"])
    policy.version = state["version"]
    policy.skipped_steps = state["skipped_steps"]
    if "random" in state:
        set_random_state(state["random"])


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Moments, master weights and their step; what comes from the configuration stays this run's.

    Megatron keeps rates, betas, eps and decay of each group with the state, and takes them from
    there.
    """
    configured = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
    unshare_step(optimizer)


def random_state() -> dict[str, Any]:
    """Every generator that code of this process may draw from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": _tracker().get_states(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states(state["megatron"])


def reseed(*words: int) -> None:
    """New states for every generator of this process but Megatron's, which has seeded its own."""
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None, "Megatron's random states are set up with its process groups"
    return tracker
