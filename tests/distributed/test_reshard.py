"""Whatever the cut of the model, every rank sees every full tensor, byte for byte."""

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megasd.testing.ranks import Ranks
from megasd.weights.layout import fill, local_shape, stage_layers
from megasd.weights.reshard import ReshardPlan, full_tensors
from megasd.weights.tables import table_for

ALONE, TOGETHER = 1, 2**30  # bucket_bytes


def hf_config(tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "num_hidden_layers": 4,
        "vocab_size": 97,  # no number of ranks divides it: padding rows are there and go
        "tie_word_embeddings": tied,
        "attention_bias": False,
    }


def hf_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = table_for(config).hf_shapes()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shards(
    config: dict[str, Any], tp_rank: int, tp_size: int, pp_rank: int, pp_size: int, spec: int
) -> dict[str, Tensor]:
    """What Megatron holds on a rank; `spec` 0: local layer spec, -1: Transformer Engine's."""
    table, full = table_for(config), hf_tensors(config)
    mine = stage_layers(table.num_layers, pp_rank, pp_size)
    held = [(row, None) for row in table.first if pp_rank == 0]
    held += [(row, layer) for layer in mine for row in table.layers]
    tied_on_one_stage = config["tie_word_embeddings"] and pp_size == 1
    if pp_rank == pp_size - 1:
        held += [(row, None) for row in table.last if row.exported or not tied_on_one_stage]
    local = {}
    for row, layer in held:
        name = row.megatron[spec].format(layer=None if layer is None else layer - mine[0])
        local[name] = torch.full(local_shape(row, tp_size), 1e9)  # seen where padding is kept
        sources = [full[tensor.at(layer)] for tensor in row.hf]
        fill(local[name], row, sources, tp_rank, tp_size)
    return local


def reshard(tp_size: int, pp_size: int, tied: bool, bucket_bytes: int, dtype: Any) -> list[str]:
    """Runs on every rank; returns the names in the order in which they came."""
    config, rank = hf_config(tied), dist.get_rank()
    pp_rank, tp_rank = divmod(rank, tp_size)
    tp_groups: list[Any] = [
        dist.new_group([s * tp_size + r for r in range(tp_size)]) for s in range(pp_size)
    ]
    pp_groups: list[Any] = [
        dist.new_group([s * tp_size + r for s in range(pp_size)]) for r in range(tp_size)
    ]
    plan = ReshardPlan(table_for(config), tp_size, pp_size, bucket_bytes)
    local = shards(config, tp_rank, tp_size, pp_rank, pp_size, spec=-(rank % 2))
    stream = full_tensors(
        plan,
        local,
        tp_group=tp_groups[pp_rank] if tp_size > 1 else None,
        pp_group=pp_groups[tp_rank] if pp_size > 1 else None,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        dtype=dtype,
    )
    received = dict(stream)
    expected = hf_tensors(config)
    for name, tensor in received.items():
        assert torch.equal(tensor, expected[name].to(dtype or torch.float32)), (rank, name)
        assert tensor.dtype == (dtype or torch.float32)
    return list(received)


@pytest.mark.parametrize("bucket_bytes", [ALONE, 3000, TOGETHER])
@pytest.mark.parametrize(
    ("tp_size", "pp_size", "tied", "dtype"),
    [
        (2, 1, True, None),
        (1, 2, True, torch.bfloat16),
        (4, 1, False, torch.bfloat16),
        (2, 2, True, None),
        (2, 2, False, None),
        (1, 4, False, None),
    ],
)
def test_every_rank_gets_every_tensor_in_the_models_order(
    ranks: Ranks,
    tp_size: int,
    pp_size: int,
    tied: bool,
    dtype: torch.dtype | None,
    bucket_bytes: int,
) -> None:
    results = ranks.run(
        reshard, tp_size, pp_size, tied, bucket_bytes, dtype, world_size=tp_size * pp_size
    )
    expected = list(hf_tensors(hf_config(tied)))
    assert results == [expected] * (tp_size * pp_size)


def one_rank(local: dict[str, Tensor], tied: bool = True) -> dict[str, Tensor]:
    plan = ReshardPlan(table_for(hf_config(tied)), 1, 1)
    return dict(full_tensors(plan, local, tp_group=None, pp_group=None, tp_rank=0, pp_rank=0))


def test_one_rank_needs_no_process_group_and_hands_out_memory_of_its_own() -> None:
    local = shards(hf_config(True), 0, 1, 0, 1, spec=0)
    received = one_rank(local)
    for parameter in local.values():
        parameter.zero_()
    expected = hf_tensors(hf_config(True))
    assert all(torch.equal(received[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.final_layernorm.weight": None}, "decoder.final_layernorm.weight is there 0"),
        ({"decoder.layers.9.bias": torch.zeros(1)}, "decoder.layers.9.bias is unknown"),
        (
            {"decoder.final_layernorm.weight": torch.zeros(3)},
            r"has shape \(3,\) instead of \(16,\)",
        ),
    ],
)
def test_a_rank_that_holds_other_parameters_than_the_plan_is_an_error(
    change: dict[str, Tensor | None], message: str
) -> None:
    local = shards(hf_config(True), 0, 1, 0, 1, spec=0) | change
    with pytest.raises(ValueError, match=message):
        one_rank({name: tensor for name, tensor in local.items() if tensor is not None})


def test_buckets_stay_within_their_size_and_within_a_stage() -> None:
    plan = ReshardPlan(table_for(hf_config(False)), tp_size=2, pp_size=2, bucket_bytes=8000)
    buckets = list(plan.buckets(element_bytes=4))
    assert [item for bucket in buckets for item in bucket] == list(plan.items)
    for bucket in buckets:
        assert len({item.stage for item in bucket}) == 1
        assert len(bucket) == 1 or sum(2 * 4 * item.local_size for item in bucket) <= 8000


def test_a_layout_that_does_not_fit_the_model_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor: 8 .*parallel\.pipeline: 3 stages"):
        ReshardPlan(table_for(hf_config(True)), tp_size=8, pp_size=3)


@pytest.mark.parametrize("bucket_bytes", [8000, 16000])
def test_a_walk_holds_at_most_two_buckets(bucket_bytes: int) -> None:
    plan = ReshardPlan(table_for(hf_config(False)), 1, 1, bucket_bytes)
    local = shards(hf_config(False), 0, 1, 0, 1, spec=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for _ in full_tensors(plan, local, tp_group=None, pp_group=None, tp_rank=0, pp_rank=0):
            pass
    profiler: Any = record.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    assert bucket_bytes <= max(accumulate(e.nbytes() for e in in_order)) <= 2 * bucket_bytes
