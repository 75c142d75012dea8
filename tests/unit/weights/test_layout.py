"""Splitting over tensor-parallel ranks is what Megatron expects, and merging undoes it exactly."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megasd.weights.layout import (
    Sizes,
    fill,
    held_entries,
    layout_errors,
    local_shape,
    merge,
    read_plan,
    stage_layers,
)
from megasd.weights.tables import table_for
from megasd.weights.tables.table import HFTensor, Kind, Row

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "num_hidden_layers": 6,
    "vocab_size": 97,
    "tie_word_embeddings": True,
    "attention_bias": False,
}

MOE = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 10}


def random_row(kind: Kind, draw: random.Random) -> Row:
    """A row of `kind` with random sizes that 1, 2 and 4 ranks divide."""
    hidden, cut, groups = 4 * draw.randint(1, 5), 4 * draw.randint(1, 6), 4 * draw.randint(1, 3)
    head, heads_per_group = draw.randint(1, 5), draw.randint(1, 4)
    shapes: dict[Kind, list[tuple[int, ...]]] = {
        "replicated": [(draw.randint(1, 9),)],
        "column": [(cut, hidden)],
        "row": [(draw.randint(1, 9), cut)],
        "gated": [(cut, hidden)] * 2,
        "qkv": [
            (groups * heads_per_group * head, hidden),
            (groups * head, hidden),
            (groups * head, hidden),
        ],
        "vocabulary": [(draw.randint(1, 50), hidden)],
    }
    tensors = [HFTensor(f"hf.{{layer}}.{i}", shape) for i, shape in enumerate(shapes[kind])]
    return Row(kind=kind, megatron=("megatron",), hf=tuple(tensors), groups=groups)


def megatron_tensor(row: Row, full: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
    """What Megatron holds, written down a second time without slices."""
    match row.kind:
        case "replicated":
            return full[0]
        case "row":
            return full[0].chunk(tp_size, dim=1)[tp_rank]
        case "vocabulary":
            padding = -len(full[0]) % tp_size
            padded = torch.cat([full[0], torch.zeros(padding, full[0].shape[1])])
            return padded.chunk(tp_size)[tp_rank]
        case "qkv":
            width = full[0].shape[1]
            per_group = [tensor.view(row.groups, -1, width) for tensor in full]
            interleaved = torch.cat(per_group, dim=1)
            return interleaved.chunk(tp_size)[tp_rank].reshape(-1, width)
        case _:
            return torch.cat([tensor.chunk(tp_size)[tp_rank] for tensor in full])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["replicated", "column", "row", "gated", "qkv", "vocabulary"])
def test_a_split_is_megatrons_and_merging_its_shards_returns_every_byte(
    kind: Kind, tp_size: int
) -> None:
    draw = random.Random(f"{kind} {tp_size}")
    for _ in range(20):
        row = random_row(kind, draw)
        full = [torch.randn(tensor.shape) for tensor in row.hf]
        shards = [torch.zeros(local_shape(row, tp_size)) for _ in range(tp_size)]
        for tp_rank, shard in enumerate(shards):
            fill(shard, row, full, tp_rank, tp_size)
            torch.testing.assert_close(
                shard, megatron_tensor(row, full, tp_rank, tp_size), rtol=0, atol=0
            )
        merged = [torch.full_like(tensor, 1e9) for tensor in full]
        merge(row, shards, merged)
        for tensor, original in zip(merged, full, strict=True):
            assert torch.equal(tensor, original)


def test_a_rank_reads_each_of_its_bytes_once_and_none_of_the_others() -> None:
    row = random_row("qkv", random.Random(0))
    for source, tensor in enumerate(row.hf):
        reads = torch.zeros(tensor.shape)
        for tp_rank in range(4):
            for piece in read_plan(row, tp_rank, 4):
                if piece.source == source:
                    reads[piece.source_slices] += 1
        assert torch.equal(reads, torch.ones(tensor.shape))


def test_a_vocabulary_smaller_than_the_ranks_leaves_some_with_padding_only() -> None:
    row = Row(kind="vocabulary", megatron=("m",), hf=(HFTensor("hf", (2, 3)),))
    full = torch.randn(2, 3)
    shards = [torch.zeros(local_shape(row, 4)) for _ in range(4)]
    for tp_rank, shard in enumerate(shards):
        fill(shard, row, [full], tp_rank, 4)
    assert torch.equal(torch.cat(shards), torch.cat([full, torch.zeros(2, 3)]))
    merged = torch.empty(2, 3)
    merge(row, shards, [merged])
    assert torch.equal(merged, full)


def test_stages_hold_the_layers_in_order_and_an_uneven_cut_is_refused() -> None:
    assert [list(stage_layers(6, stage, 3)) for stage in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match=r"parallel\.pipeline: 4 stages do not divide 6 layers"):
        stage_layers(6, 0, 4)


def test_every_reason_why_a_model_cannot_be_cut_is_listed() -> None:
    table = table_for(QWEN3)
    assert layout_errors(table, Sizes(tp=2, pp=3)) == []
    assert layout_errors(table, Sizes(tp=8, pp=4, ep=2)) == [
        "parallel.tensor: 8 does not divide 4, key-value heads of "
        "model.layers.*.self_attn.q_proj.weight",
        "parallel.tensor: 8 does not divide 20, dimension 0 of model.layers.*.mlp.gate_proj.weight",
        "parallel.tensor: 8 does not divide 20, dimension 1 of model.layers.*.mlp.down_proj.weight",
        "parallel.pipeline: 4 stages do not divide the model's 6 layers",
        "parallel.expert: 2 does not divide the 0 experts of qwen3",
    ]


def test_experts_are_cut_by_expert_parallelism_and_each_by_expert_tensor_parallelism() -> None:
    table = table_for(MOE)
    assert layout_errors(table, Sizes(tp=4, pp=3, ep=2, etp=2)) == []
    assert layout_errors(table, Sizes(ep=4, etp=4)) == [
        "parallel.expert_tensor: 4 does not divide 10, dimension 0 of "
        "model.layers.*.mlp.experts.*.gate_proj.weight",
        "parallel.expert_tensor: 4 does not divide 10, dimension 1 of "
        "model.layers.*.mlp.experts.*.down_proj.weight",
        "parallel.expert: 4 does not divide the 6 experts of qwen3_moe",
    ]


@pytest.mark.parametrize("config", [QWEN3, MOE])
def test_ranks_together_hold_every_parameter_and_only_a_parted_tied_head_twice(
    config: dict[str, Any],
) -> None:
    table = table_for({**config, "tie_word_embeddings": True})
    sizes = Sizes(pp=2, ep=2 if table.num_experts else 1)
    held = {
        (pp, ep): held_entries(table, sizes, pp, ep) for pp in range(2) for ep in range(sizes.ep)
    }
    everything = [entry for entries in held.values() for entry in entries]
    assert set(everything) == set(table.entries())
    experts = [entry for entry in everything if entry.expert is not None]
    assert len(experts) == len(set(experts))
    for (pp, ep), entries in held.items():
        assert {e.layer for e in entries if e.layer is not None} == set(range(3 * pp, 3 * pp + 3))
        assert {e.expert for e in entries} - {None} == set(
            range(table.num_experts)[3 * ep : 3 * ep + 3]
        )
    assert [e.row for e in held_entries(table, Sizes(), 0, 0)][-1].exported
