"""A vocabulary cut over a tensor-parallel group gives what one rank with all of it gives."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasd.policy.head import vocabulary_head
from megasd.testing.ranks import Ranks

TOKENS, HIDDEN, VOCAB = 21, 6, 13


def _run(weight: Tensor, group: dist.ProcessGroup | None) -> tuple[list[np.ndarray], Tensor]:
    """Log-probs, entropy, gradient of `weight`; and (partial) gradient of hidden."""
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=random).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=random)
    upstream = torch.randn(2, TOKENS, generator=random)
    weight.requires_grad_()
    output = vocabulary_head(
        hidden, weight, targets, vocab_size=VOCAB, group=group, temperature=0.7, chunk_tokens=5
    )
    torch.autograd.backward(list(output), list(upstream))
    assert hidden.grad is not None
    assert weight.grad is not None
    return [x.detach().numpy() for x in (*output, weight.grad)], hidden.grad


def _weight() -> Tensor:
    return 3.0 * torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))


def _sharded(groups: list[list[int]], shard_rows: int) -> list[np.ndarray]:
    mine, _ = dist.new_subgroups_by_enumeration(groups)
    assert isinstance(mine, dist.ProcessGroup)
    place = dist.get_rank(mine)
    padded = torch.full((shard_rows * len(groups[0]), HIDDEN), torch.nan)
    padded[:VOCAB] = _weight()
    shard = padded[place * shard_rows : (place + 1) * shard_rows].clone()
    results, partial_gradient = _run(shard, mine)
    dist.all_reduce(partial_gradient, group=mine)  # what the region in front of the head does
    return [*results, partial_gradient.numpy()]


@pytest.mark.parametrize(
    ("groups", "shard_rows"),
    [
        pytest.param([[0, 1]], 8, id="8 and 5 valid rows"),
        pytest.param([[0, 1]], 16, id="13 and 0 valid rows"),
        pytest.param([[0, 1, 2, 3]], 4, id="4, 4, 4 and 1 valid rows"),
        pytest.param([[0, 1, 2, 3]], 8, id="8, 5, 0 and 0 valid rows"),
        pytest.param([[0, 2], [1, 3]], 7, id="two groups that are not neighbours"),
    ],
)
def test_shards_give_the_values_and_gradients_of_the_whole(
    ranks: Ranks, groups: list[list[int]], shard_rows: int
) -> None:
    (logprobs, entropy, weight_gradient), hidden_gradient = _run(_weight(), None)
    world_size = sum(len(members) for members in groups)
    results = ranks.run(_sharded, groups, shard_rows, world_size=world_size)
    for members in groups:
        for rank in members:
            np.testing.assert_allclose(results[rank][0], logprobs, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(results[rank][1], entropy, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(results[rank][3], hidden_gradient, rtol=1e-4, atol=1e-5)
            for value, of_first in zip(results[rank][:2], results[members[0]][:2], strict=True):
                np.testing.assert_array_equal(value, of_first)  # replicas must not drift apart
        gradient = np.concatenate([results[rank][2] for rank in members])
        np.testing.assert_allclose(gradient[:VOCAB], weight_gradient, rtol=1e-4, atol=1e-5)
        assert not gradient[VOCAB:].any()


def _without_tokens() -> tuple[int, bool]:
    weight = torch.ones(4, HIDDEN, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    output = vocabulary_head(
        torch.zeros(0, HIDDEN), weight, targets, vocab_size=8, group=dist.group.WORLD
    )
    output.logprobs.sum().backward()
    assert weight.grad is not None
    return len(output.logprobs), bool(weight.grad.any())


def test_a_group_without_tokens_gets_empty_outputs_and_zero_gradients(ranks: Ranks) -> None:
    assert ranks.run(_without_tokens, world_size=2) == [(0, False)] * 2
