"""Whatever the cut of the model, every rank receives its tensors, byte for byte."""

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megasd.testing.ranks import Ranks
from megasd.weights.bucket import named_tensors
from megasd.weights.layout import Sizes, fill, held_entries, local_shape, stage_layers
from megasd.weights.reshard import Place, ReshardPlan, reshard
from megasd.weights.tables import table_for

ALONE, TOGETHER = 1, 2**30  # bucket_bytes


def hf_config(tied: bool = False, experts: int = 0) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe" if experts else "qwen3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "num_hidden_layers": 4,
        "vocab_size": 97,  # no number of ranks divides it: padding rows are there and go
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "num_experts": experts,
        "moe_intermediate_size": 12,
    }


def hf_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = table_for(config).hf_shapes()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shards(plan: ReshardPlan, config: dict[str, Any], place: Place, spec: int) -> dict[str, Tensor]:
    """What Megatron holds on a rank; `spec` 0: local layer spec, -1: Transformer Engine's."""
    full, sizes = hf_tensors(config), plan.sizes
    ep_rank, etp_rank = divmod(place.expert, sizes.etp)
    first_layer = stage_layers(plan.table.num_layers, place.pp, sizes.pp)[0]
    local = {}
    for entry in held_entries(plan.table, sizes, place.pp, ep_rank):
        row, ways = entry.row, sizes.ways(entry.row)
        name = row.megatron[spec].format(
            layer=None if entry.layer is None else entry.layer - first_layer,
            expert=None if entry.expert is None else entry.expert - ep_rank * plan.expert_share,
        )
        local[name] = torch.full(local_shape(row, ways), 1e9)  # seen where padding is kept
        sources = [full[tensor] for tensor in entry.hf_names()]
        fill(local[name], row, sources, etp_rank if row.experts else place.tp, ways)
    return local


def place_of(rank: int, world_size: int, sizes: Sizes) -> Place:
    """Megatron's order: tp and (etp, ep) run innermost within a stage, stages outermost."""
    stage_size, experts = world_size // sizes.pp, sizes.ep * sizes.etp
    pp_rank, stage_rank = divmod(rank, stage_size)

    def group_of(members: list[list[int]]) -> Any:
        groups = [dist.new_group(ranks) for ranks in members]  # all ranks make all, in one order
        return next(g for g, ranks in zip(groups, members, strict=True) if rank in ranks)

    def cut(size: int) -> list[list[int]]:
        return [list(range(start, start + size)) for start in range(0, world_size, size)]

    return Place(
        tp=stage_rank % sizes.tp,
        pp=pp_rank,
        expert=stage_rank % experts,
        stage=stage_rank,
        tp_group=group_of(cut(sizes.tp)) if sizes.tp > 1 else None,
        expert_group=group_of(cut(experts)) if experts > 1 else None,
        pp_group=group_of(
            [[s * stage_size + r for s in range(sizes.pp)] for r in range(stage_size)]
        )
        if sizes.pp > 1
        else None,
    )


def receive(
    config: dict[str, Any], sizes: Sizes, bucket_bytes: int, dtype: Any, receivers: int
) -> tuple[list[str], list[int]]:
    """Runs on every rank; returns the names in the order in which they came, and the experts."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plan = ReshardPlan(table_for(config), sizes, bucket_bytes=bucket_bytes, receivers=receivers)
    place = place_of(rank, world_size, sizes)
    local = shards(plan, config, place, spec=-(rank % 2))
    expected, names = hf_tensors(config), []
    for bucket in reshard(plan, local, place, dtype=dtype):
        flat = torch.cat([tensor.flatten() for tensor in bucket.tensors.values()])
        assert torch.equal(flat, bucket.flat)
        for name, tensor in bucket.tensors.items():
            assert torch.equal(tensor, expected[name].to(dtype or torch.float32)), (rank, name)
            assert tensor.dtype == (dtype or torch.float32)
            names.append(name)
    return names, list(plan.wanted(place.stage))


@pytest.mark.parametrize("bucket_bytes", [ALONE, 3000, TOGETHER])
@pytest.mark.parametrize(
    ("sizes", "tied", "dtype"),
    [
        (Sizes(tp=2), True, None),
        (Sizes(pp=2), True, torch.bfloat16),
        (Sizes(tp=4), False, torch.bfloat16),
        (Sizes(tp=2, pp=2), True, None),
        (Sizes(tp=2, pp=2), False, None),
        (Sizes(pp=4), False, None),
    ],
)
def test_every_rank_gets_every_tensor_of_a_dense_model_once_and_in_one_order(
    ranks: Ranks, sizes: Sizes, tied: bool, dtype: torch.dtype | None, bucket_bytes: int
) -> None:
    config, world_size = hf_config(tied), sizes.tp * sizes.pp
    results = ranks.run(receive, config, sizes, bucket_bytes, dtype, 1, world_size=world_size)
    assert all(result == results[0] for result in results)
    assert sorted(results[0][0]) == sorted(hf_tensors(config))


EXPERT_LAYOUTS = {
    "EP2": (2, Sizes(ep=2)),
    "EP4": (4, Sizes(ep=4)),
    "ETP2": (2, Sizes(tp=2, etp=2)),
    "TP2 EP2": (4, Sizes(tp=2, ep=2)),
    "PP2 EP2": (4, Sizes(pp=2, ep=2)),
    "TP2 EP2 ETP2": (4, Sizes(tp=2, ep=2, etp=2)),
    "TP4 EP1": (4, Sizes(tp=4)),
}


@pytest.mark.parametrize("receivers", [1, 2, 4])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_every_rank_gets_the_experts_of_its_receiver_and_all_that_is_not_an_expert(
    ranks: Ranks, layout: str, receivers: int
) -> None:
    """Receivers that cut their experts finer or coarser than the trainer, or not at all."""
    world_size, sizes = EXPERT_LAYOUTS[layout]
    if receivers > world_size // sizes.pp:
        receivers = world_size // sizes.pp
    config = hf_config(experts=8)
    for bucket_bytes in (ALONE, 9000, TOGETHER):
        results = ranks.run(
            receive, config, sizes, bucket_bytes, torch.bfloat16, receivers, world_size=world_size
        )
        for rank, (names, wanted) in enumerate(results):
            share = rank % (world_size // sizes.pp) % receivers
            assert wanted == list(range(8))[share * 8 // receivers : (share + 1) * 8 // receivers]
            entries = table_for(config).entries()
            expected = [
                name
                for entry in entries
                if entry.expert is None or entry.expert in wanted
                for name in entry.hf_names()
            ]
            assert sorted(names) == sorted(expected)


def one_rank(config: dict[str, Any], local: dict[str, Tensor]) -> dict[str, Tensor]:
    plan = ReshardPlan(table_for(config), Sizes())
    return {n: t.clone() for n, t in named_tensors(reshard(plan, local, Place()))}


@pytest.mark.parametrize("experts", [0, 4])
def test_one_rank_needs_no_process_group_and_hands_out_memory_of_its_own(experts: int) -> None:
    config = hf_config(True, experts)
    plan = ReshardPlan(table_for(config), Sizes())
    local = shards(plan, config, Place(), spec=0)
    for bucket in reshard(plan, local, Place()):
        bucket.flat.zero_()
    received = one_rank(config, local)
    expected = hf_tensors(config)
    assert all(torch.equal(received[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.final_layernorm.weight": None}, "decoder.final_layernorm.weight is missing"),
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
    config = hf_config(True)
    local = shards(ReshardPlan(table_for(config), Sizes()), config, Place(), spec=0) | change
    with pytest.raises(ValueError, match=message):
        one_rank(config, {name: tensor for name, tensor in local.items() if tensor is not None})


def test_rounds_hold_each_parameter_once_and_stay_within_their_size_and_a_stage() -> None:
    table = table_for(hf_config(experts=8))
    plan = ReshardPlan(table, Sizes(tp=2, pp=2, ep=2), bucket_bytes=12_000)
    rounds = plan.rounds(element_bytes=4)
    entries = [
        unit.entry(ep_rank, plan.expert_share)
        for one in rounds
        for unit in one.units
        for ep_rank in range(2 if one.of_experts else 1)
    ]
    assert set(entries) == set(table.entries())
    assert len(entries) == len(list(table.entries()))
    for one in rounds:
        assert len({unit.slot is None for unit in one.units}) == 1
        size = 4 * sum(map(plan.unit_elements, one.units))
        assert len(one.units) == 1 or size <= 6_000  # two of them fit


def receive_where_taken(
    config: dict[str, Any], sizes: Sizes, receivers: int, takers: list[int]
) -> tuple[list[str], int]:
    """Names of this rank, all of them right, and the elements that it had a part in moving."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plan = ReshardPlan(table_for(config), sizes, bucket_bytes=9000, receivers=receivers)
    place = place_of(rank, world_size, sizes)
    local, expected = shards(plan, config, place, spec=0), hf_tensors(config)
    names, moved = [], 0
    broadcast, exchange = dist.broadcast, dist.all_to_all_single

    def count(collective: Any) -> Any:
        def counted(tensor: Tensor, *rest: Any, **options: Any) -> Any:
            nonlocal moved
            moved += tensor.numel()
            return collective(tensor, *rest, **options)

        return counted

    dist.broadcast, dist.all_to_all_single = count(broadcast), count(exchange)
    try:
        for bucket in reshard(plan, local, place, takes=rank in takers):
            for name, tensor in bucket.tensors.items():
                assert torch.equal(tensor, expected[name]), (rank, name)
                names.append(name)
    finally:
        dist.broadcast, dist.all_to_all_single = broadcast, exchange
    return names, moved


@pytest.mark.parametrize(
    ("sizes", "receivers", "takers", "idle"),
    [
        (Sizes(tp=2), 1, [2], [0, 1]),  # the other replica
        (Sizes(tp=2, pp=2), 1, [3], []),
        (Sizes(pp=2), 1, [1], [0, 2]),
        (Sizes(pp=2, ep=2), 2, [2, 3], []),  # a server whose two workers share the experts
        (Sizes(tp=2, ep=2), 2, [0, 1], [2, 3]),
        (Sizes(tp=2, ep=4), 1, [], [0, 1, 2, 3]),
    ],
)
def test_ranks_that_take_nothing_do_what_others_need_of_them_and_no_more(
    ranks: Ranks, sizes: Sizes, receivers: int, takers: list[int], idle: list[int]
) -> None:
    config = hf_config(experts=8 if sizes.ep > 1 else 0)
    arguments = (config, sizes, receivers)
    some = ranks.run(receive_where_taken, *arguments, takers, world_size=4)
    every = ranks.run(receive_where_taken, *arguments, [0, 1, 2, 3], world_size=4)
    for rank, ((names, moved), (all_names, most)) in enumerate(zip(some, every, strict=True)):
        assert names == (all_names if rank in takers else [])
        assert (moved == 0) == (rank in idle)
        assert moved <= most


def test_a_rank_that_only_has_shards_of_others_takes_no_part_between_stages(ranks: Ranks) -> None:
    """Rank 0 takes, rank 2 is its other stage; 1 and 3 are in their expert groups."""
    results = ranks.run(
        receive_where_taken, hf_config(experts=8), Sizes(pp=2, ep=2), 1, [0], world_size=4
    )
    taken, gathered = results[0][1], results[1][1]
    assert [moved for _, moved in results] == [taken, gathered, taken, gathered]
    assert gathered < taken / 2


def test_a_layout_that_does_not_fit_the_model_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor: 8 .*parallel\.pipeline: 3 stages"):
        ReshardPlan(table_for(hf_config()), Sizes(tp=8, pp=3))
    with pytest.raises(ValueError, match=r"parallel\.expert: 3 does not divide the 8 experts"):
        ReshardPlan(table_for(hf_config(experts=8)), Sizes(ep=3))
    with pytest.raises(ValueError, match="5 receivers do not divide 8 experts"):
        ReshardPlan(table_for(hf_config(experts=8)), Sizes(), receivers=5)


def peak_bytes(config: dict[str, Any], sizes: Sizes, bucket_bytes: int, receivers: int) -> int:
    """The most that a walk holds at a time on this rank, by torch's own account."""
    plan = ReshardPlan(table_for(config), sizes, bucket_bytes=bucket_bytes, receivers=receivers)
    place = place_of(dist.get_rank(), dist.get_world_size(), sizes) if sizes != Sizes() else Place()
    local = shards(plan, config, place, spec=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for _ in reshard(plan, local, place):
            pass
    profiler: Any = record.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    return max(accumulate(e.nbytes() for e in in_order))


@pytest.mark.parametrize("bucket_bytes", [8000, 32_000])
def test_a_walk_holds_at_most_two_buckets(ranks: Ranks, bucket_bytes: int) -> None:
    assert bucket_bytes / 4 <= peak_bytes(hf_config(), Sizes(), bucket_bytes, 1) <= bucket_bytes
    cases = [(hf_config(), Sizes(tp=2), 1)]
    cases += [(hf_config(experts=8), Sizes(ep=2), receivers) for receivers in (1, 2)]
    for config, sizes, receivers in cases:
        peaks = ranks.run(peak_bytes, config, sizes, bucket_bytes, receivers, world_size=2)
        assert all(bucket_bytes <= peak <= 2 * bucket_bytes for peak in peaks), (sizes, peaks)
