"""The bytes that a sync is said to move are those of the model, each counted once."""

import math

import pytest

from megasd.weights.layout import Sizes
from megasd.weights.reshard import ReshardPlan
from megasd.weights.tables import table_for
from megasd.weights.tables.table import Table
from megasd.weights.traffic import traffic

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "num_hidden_layers": 4,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts": 8,
    "moe_intermediate_size": 12,
}


def model_bytes(table: Table, experts: range) -> int:
    return sum(
        2 * math.prod(tensor.shape)
        for entry in table.entries()
        if entry.expert is None or entry.expert in experts
        for tensor in entry.row.hf
    )


@pytest.mark.parametrize("receivers", [1, 2, 4])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tp=2, ep=2), Sizes(tp=2, pp=2, ep=4, etp=1)])
def test_a_rank_takes_in_every_byte_of_its_receiver_once(sizes: Sizes, receivers: int) -> None:
    table = table_for(MODEL)
    plan = ReshardPlan(table, sizes, receivers=receivers, bucket_bytes=4000)
    for pp in range(sizes.pp):
        for stage_rank in range(4):
            found = traffic(plan, pp=pp, stage_rank=stage_rank)
            assert found.total == model_bytes(table, plan.wanted(stage_rank))
            assert found.rounds == len(plan.rounds(2))


def test_where_bytes_come_from_follows_the_cut() -> None:
    table = table_for(MODEL)
    dense, experts = model_bytes(table, range(0)), model_bytes(table, range(8))
    experts -= dense
    alone = traffic(ReshardPlan(table, Sizes()), pp=0, stage_rank=0)
    assert (alone.own, alone.total) == (dense + experts, dense + experts)
    cut = traffic(ReshardPlan(table, Sizes(tp=4, ep=4)), pp=0, stage_rank=1)
    assert cut.tensor_parallel == dense * 3 // 4
    assert cut.expert_parallel == experts * 3 // 4
    # Engines that share their experts as the trainer does need none of other ranks.
    shared = traffic(ReshardPlan(table, Sizes(tp=4, ep=4), receivers=4), pp=0, stage_rank=1)
    assert (shared.expert_parallel, shared.own) == (0, dense // 4 + experts // 4)
    stages = traffic(ReshardPlan(table, Sizes(pp=2, ep=4), receivers=4), pp=1, stage_rank=0)
    assert stages.expert_parallel == 0
    assert stages.pipeline > experts // 8
