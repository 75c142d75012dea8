"""A vocabulary cut over a tensor-parallel group gives what one rank with all of it gives."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasd.policy.head.divergence import full_divergence
from megasd.policy.head.head import TopIds, sample_ids, vocabulary_head
from megasd.testing.ranks import Ranks
from tests.unit.policy.interpreter import NEEDS_TRITON, interpreted_kernels

TOKENS, HIDDEN, VOCAB = 21, 6, 13

CUTS = pytest.mark.parametrize(
    ("groups", "shard_rows"),
    [
        pytest.param([[0, 1]], 8, id="8 and 5 valid rows"),
        pytest.param([[0, 1]], 16, id="13 and 0 valid rows"),
        pytest.param([[0, 1, 2, 3]], 4, id="4, 4, 4 and 1 valid rows"),
        pytest.param([[0, 1, 2, 3]], 8, id="8, 5, 0 and 0 valid rows"),
        pytest.param([[0, 2], [1, 3]], 7, id="two groups that are not neighbours"),
    ],
)


def _run(
    weight: Tensor, group: dist.ProcessGroup | None, tokens: int = TOKENS
) -> tuple[list[np.ndarray], Tensor]:
    """Log-probs (of targets, at ids), entropy, `weight`'s gradient; hidden's (partial) gradient."""
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, HIDDEN, generator=random).to(weight.dtype).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), generator=random)
    upstream = torch.randn(2, tokens, generator=random)
    ids = torch.randint(VOCAB, (tokens, 8), generator=random)
    upstream_at_ids = torch.randn(tokens, 8, generator=random)
    weight.requires_grad_()
    output = vocabulary_head(
        hidden,
        weight,
        targets,
        ids=ids,
        vocab_size=VOCAB,
        group=group,
        temperature=0.7,
        chunk_tokens=5,
    )
    assert output.at_ids is not None
    values = [output.logprobs, output.entropy, output.at_ids]
    torch.autograd.backward(values, [x.to(weight.dtype) for x in (*upstream, upstream_at_ids)])
    assert hidden.grad is not None
    assert weight.grad is not None
    return [x.detach().numpy() for x in (*values, weight.grad)], hidden.grad


def _weight() -> Tensor:
    return 3.0 * torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))


def _shard(whole: Tensor, group: dist.ProcessGroup, shard_rows: int) -> Tensor:
    """This rank's rows; those of padding are NaN."""
    place, size = dist.get_rank(group), dist.get_world_size(group)
    padded = whole.new_full((shard_rows * size, whole.shape[1]), torch.nan)
    padded[:VOCAB] = whole
    return padded[place * shard_rows : (place + 1) * shard_rows].clone()


def _subgroup(groups: list[list[int]]) -> dist.ProcessGroup:
    mine, _ = dist.new_subgroups_by_enumeration(groups)
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _sharded(groups: list[list[int]], shard_rows: int) -> list[np.ndarray]:
    mine = _subgroup(groups)
    results, partial_gradient = _run(_shard(_weight(), mine, shard_rows), mine)
    dist.all_reduce(partial_gradient, group=mine)  # what the region in front of the head does
    return [*results, partial_gradient.numpy()]


def _assert_like_the_whole(
    results: list[list[np.ndarray]],
    groups: list[list[int]],
    whole: tuple[list[np.ndarray], Tensor],
    rtol: float = 1e-5,
) -> None:
    """`results` of a rank, `whole`: values, gradient of the weight, gradient of hidden."""
    (*values, weight_gradient), hidden_gradient = whole
    for members in groups:
        for rank in members:
            *shared, _, of_hidden = results[rank]
            for mine, value, of_first in zip(shared, values, results[members[0]], strict=False):
                np.testing.assert_allclose(mine, value, rtol=rtol, atol=rtol)
                np.testing.assert_array_equal(mine, of_first)  # replicas must not drift apart
            np.testing.assert_allclose(of_hidden, hidden_gradient, rtol=10 * rtol, atol=rtol)
        gradient = np.concatenate([results[rank][-2] for rank in members])
        np.testing.assert_allclose(gradient[:VOCAB], weight_gradient, rtol=10 * rtol, atol=rtol)
        assert not gradient[VOCAB:].any()


@CUTS
def test_shards_give_the_values_and_gradients_of_the_whole(
    ranks: Ranks, groups: list[list[int]], shard_rows: int
) -> None:
    world_size = sum(len(members) for members in groups)
    results = ranks.run(_sharded, groups, shard_rows, world_size=world_size)
    _assert_like_the_whole(results, groups, _run(_weight(), None))


def _read_ids(
    weight: Tensor, group: dist.ProcessGroup | None, tokens: int = TOKENS
) -> list[np.ndarray]:
    """The top ids with their log-probs, of logits full of ties, and drawn ids."""
    random = torch.Generator().manual_seed(9)
    hidden = torch.randint(-1, 2, (tokens, HIDDEN), generator=random).to(weight.dtype)
    uniforms = torch.rand(tokens, 50, generator=random)
    cut = {"vocab_size": VOCAB, "group": group, "chunk_tokens": 5}
    targets = torch.zeros(tokens, dtype=torch.int64)
    tops = [vocabulary_head(hidden, weight, targets, top_k=k, **cut).top for k in (1, 5, VOCAB)]
    read = [x.numpy() for top in tops if isinstance(top, TopIds) for x in top]
    return [*read, sample_ids(hidden, weight, uniforms, temperature=1.5, **cut).numpy()]


def _whole_numbers() -> Tensor:
    return _weight().round().clamp(-1, 1).double()


def _read_ids_sharded(groups: list[list[int]], shard_rows: int) -> list[np.ndarray]:
    mine = _subgroup(groups)
    return _read_ids(_shard(_whole_numbers(), mine, shard_rows), mine)


@CUTS
def test_shards_give_the_top_ids_and_draws_of_the_whole(
    ranks: Ranks, groups: list[list[int]], shard_rows: int
) -> None:
    expected = _read_ids(_whole_numbers(), None)
    assert len(expected) == 7
    world_size = sum(len(members) for members in groups)
    for result in ranks.run(_read_ids_sharded, groups, shard_rows, world_size=world_size):
        for value, reference in zip(result, expected, strict=True):
            if value.dtype == np.int64:
                np.testing.assert_array_equal(value, reference)
            else:
                np.testing.assert_allclose(value, reference, rtol=1e-12)


def _diverge(
    weight: Tensor, teacher_weight: Tensor, group: dist.ProcessGroup | None, tokens: int = TOKENS
) -> tuple[list[np.ndarray], Tensor]:
    """All three divergences, gradient of `weight`; and (partial) gradient of hidden."""
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, HIDDEN, generator=random).to(weight.dtype).requires_grad_()
    teacher_hidden = torch.randn(tokens, 2 * HIDDEN, generator=random).to(weight.dtype)
    upstream = torch.randn(3, tokens, generator=random).to(weight.dtype)
    weight.requires_grad_()
    values = [
        full_divergence(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            kind=kind,
            alpha=0.3,
            entry_clip=0.5,
            vocab_size=VOCAB,
            group=group,
            temperature=0.7,
            chunk_tokens=5,
        )
        for kind in ("forward_kl", "reverse_kl", "jsd")
    ]
    torch.autograd.backward(values, list(upstream))
    assert hidden.grad is not None
    assert weight.grad is not None
    return [x.detach().numpy() for x in (*values, weight.grad)], hidden.grad


def _weights_of_both() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(6)
    return _weight().double(), torch.randn(VOCAB, 2 * HIDDEN, generator=random).double()


def _diverge_sharded(groups: list[list[int]], shard_rows: int) -> list[np.ndarray]:
    mine = _subgroup(groups)
    weight, teacher_weight = (_shard(whole, mine, shard_rows) for whole in _weights_of_both())
    results, partial_gradient = _diverge(weight, teacher_weight, mine)
    dist.all_reduce(partial_gradient, group=mine)
    return [*results, partial_gradient.numpy()]


@CUTS
def test_shards_give_the_divergences_of_the_whole(
    ranks: Ranks, groups: list[list[int]], shard_rows: int
) -> None:
    world_size = sum(len(members) for members in groups)
    results = ranks.run(_diverge_sharded, groups, shard_rows, world_size=world_size)
    _assert_like_the_whole(results, groups, _diverge(*_weights_of_both(), None), rtol=1e-11)


def _by_kernels(groups: list[list[int]], shard_rows: int) -> tuple[list[np.ndarray], ...]:
    """What the head gives, the divergences, and the top ids, by Triton's interpreter in float32."""
    mine = _subgroup(groups)
    weights = [_weight().float(), *_weights_of_both(), _whole_numbers()]
    shards = [_shard(whole.float(), mine, shard_rows) for whole in weights]
    with interpreted_kernels():
        results, of_hidden = _run(shards[0], mine, 4)
        divergences, of_divergences = _diverge(shards[1], shards[2], mine, 4)
        read = _read_ids(shards[3], mine, 4)
    for partial_gradient in (of_hidden, of_divergences):
        dist.all_reduce(partial_gradient, group=mine)
    return [*results, of_hidden.numpy()], [*divergences, of_divergences.numpy()], read


@NEEDS_TRITON
@pytest.mark.parametrize("shard_rows", [8, 16])
def test_the_kernels_give_on_shards_what_float64_gives_on_the_whole(
    ranks: Ranks, shard_rows: int
) -> None:
    groups = [[0, 1]]
    results, divergences, read = zip(
        *ranks.run(_by_kernels, groups, shard_rows, world_size=2), strict=True
    )
    _assert_like_the_whole([*results], groups, _run(_weight().double(), None, 4))
    _assert_like_the_whole([*divergences], groups, _diverge(*_weights_of_both(), None, 4))
    *expected, _draws = _read_ids(_whole_numbers(), None, 4)
    for result in read:
        for value, reference in zip(result, expected, strict=False):
            np.testing.assert_allclose(value, reference, rtol=1e-6)


def _without_tokens() -> tuple[list[tuple[int, ...]], bool]:
    hidden, weight = torch.zeros(0, HIDDEN), torch.ones(4, HIDDEN, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    cut = {"vocab_size": 8, "group": dist.group.WORLD}
    output = vocabulary_head(hidden, weight, none, ids=none[:, None], top_k=3, **cut)
    value = full_divergence(hidden, weight, hidden, weight, kind="jsd", **cut)
    drawn = sample_ids(hidden, weight, torch.zeros(0, 2), **cut)
    assert output.top is not None
    assert output.at_ids is not None
    (output.logprobs.sum() + output.at_ids.sum() + value.sum()).backward()
    assert weight.grad is not None
    values = (output.logprobs, output.at_ids, output.top.ids, drawn, value)
    return [tuple(x.shape) for x in values], bool(weight.grad.any())


def test_a_group_without_tokens_gets_empty_outputs_and_zero_gradients(ranks: Ranks) -> None:
    shapes = [(0,), (0, 1), (0, 3), (0, 2), (0,)]
    assert ranks.run(_without_tokens, world_size=2) == [(shapes, False)] * 2
