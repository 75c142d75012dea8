"""What ranks run for the tests of what Megatron does: its faults, and what travels in a step."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.policy_cases import (
    PlainLoss,
    batch_and_credit,
    make_policy,
    offsets_of,
    random_views,
    weights_of,
)


def faults_with_experts(folder: Path) -> dict[str, bool]:
    """Whether each fault of Megatron's experts that policy/megatron/fixes.py mends is there."""
    import importlib.util

    from megasd.policy import backend

    backend.start("cpu")
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.moe import moe_utils

    policy = make_policy(folder, {})
    fuses = dataclasses.replace(policy.state.gpt.config, gradient_accumulation_fusion=True)
    with pytest.raises(RuntimeError, match="APEX"):
        ColumnParallelLinear(8, 8, config=fuses, init_method=torch.nn.init.zeros_)

    # A second copy of the module: the first may have been mended by an earlier case.
    spec = importlib.util.find_spec(moe_utils.__name__)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    splits = bare.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)
    layer = policy.state.gpt.decoder.layers[0].mlp
    layer.forward(torch.randn(3, 1, policy.state.gpt.config.hidden_size))  # without our hook
    probabilities = getattr(layer.token_dispatcher, "probs", None)
    return {
        "te_general_gemm is no name": not hasattr(bare, "te_general_gemm"),
        "split sizes stay a tensor": isinstance(splits, torch.Tensor),
        "routing stays with its graph": probabilities is not None and probabilities.requires_grad,
    }


def who_adds_weight_gradients_in_place(folder: Path) -> dict[str, bool]:
    """By what is installed: whether local layers add their gradients to the buffer themselves."""
    policy = make_policy(folder, {})
    from megatron.core.tensor_parallel import layers

    from megasd.policy.backend import Backend
    from megasd.policy.config import ModelConfig
    from megasd.policy.megatron.build import transformer_config

    model = ModelConfig(path=str(folder), dtype="float32")

    def fuses(device: str, apex: bool) -> bool:
        backend = Backend(torch.device(device), "gloo", transformer_engine=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "_grad_accum_fusion_available", apex)
            config = transformer_config(policy.hf_config, model, policy.layout, backend)
        return config.gradient_accumulation_fusion

    return {
        "apex": fuses("cuda", apex=True),
        "nothing": fuses("cuda", apex=False),
        "apex, on a CPU": fuses("cpu", apex=True),
    }


def steps_and_traffic(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Five steps, the second over a single rollout, and what travels in each.

    Of the third and fourth the old log-probs are known; the fourth is skipped, and alone the last
    of its batch. `settles`: between steps the parameters are gathered by hand.
    """
    policy = make_policy(folder, settings)
    fewest = fewest_tokens(policy.state.gpt)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        events = note_traffic(patch, policy.state.ddp)
        for step, share in enumerate((slice(6), slice(1, 3), *[slice(6)] * 3)):
            views = random_views(step, count=6, vocab=100)[share]
            offsets = offsets_of(views)
            batch, credit = batch_and_credit(views, seed=step)
            if step in (2, 3):
                batch = dataclasses.replace(batch, old_logprobs=torch.zeros(int(offsets[-1])))
            if step != 3:
                batch.minibatch_ids[-1] = 1
            events.clear()
            loss = PlainLoss(root=step == 3)
            done = policy.update(views, offsets, batch, credit, loss, minibatch=0)
            assert done.outcome == ("skipped" if step == 3 else "stepped")
            values = events.count(int(offsets[-1]))
            traffic = [event for event in events if isinstance(event, str)]
            steps.append((traffic, values, done.logprobs is not None))
            if settings.get("settles"):
                policy.state.ddp.start_param_sync(force_sync=True)
    wrapped, gpt, heads = policy.state.ddp, policy.state.gpt, []
    for _ in range(2 * gpt.post_process):
        heads.append(gpt.head_weight.detach().clone())
        wrapped.start_param_sync(force_sync=True)
    wrapped.start_param_sync(force_sync=True)
    return {
        "head was gathered": all(torch.equal(head, heads[0]) for head in heads),
        "weights": weights_of(policy),
        "steps": steps,
        "buckets": len(wrapped.bucket_groups) + len(wrapped.expert_parallel_bucket_groups),
        "fewest tokens of an expert": min(fewest, default=None),
    }


def fewest_tokens(gpt: torch.nn.Module) -> list[int]:
    """Filled with the number of tokens of the expert that has the fewest, call by call."""
    fewest: list[int] = []
    for name, module in gpt.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda _, given: fewest.append(int(given[1].min())))
    return fewest


def note_traffic(patch: pytest.MonkeyPatch, ddp: Any) -> list[str | int]:
    """Filled with what travels, in order; of sums, how many numbers."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    events: list[str | int] = []
    all_reduce = dist.all_reduce

    def note(owner: Any, name: str, event: str) -> None:
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *a, **k: (events.append(event), real(*a, **k))[1])

    def note_size(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        events.append(values.numel())
        return all_reduce(values, *args, **kwargs)

    note(param_and_grad_buffer, "dist_reduce_scatter_func", "reduce")
    note(param_and_grad_buffer, "dist_all_gather_func", "gather")
    note(ddp, "finish_grad_sync", "backward is over")
    note(P2PCommunicator, "_communicate_shapes", "shapes")
    patch.setattr(dist, "all_reduce", note_size)
    return events
