"""Draws from the head against inversion of the dense cumulative distribution."""

import pytest
import torch
from torch import Tensor

from megasd.policy.head import blocks
from megasd.policy.head.head import sample_ids
from tests.unit.policy.test_head import Problem, Recorder

VOCAB = 37


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 16)


def _uniforms(tokens: int, draws: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(8)
    return torch.rand(tokens, draws, generator=random, dtype=dtype)


def _inverted(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    return torch.searchsorted(logprobs.exp().cumsum(1), uniforms.double(), right=True)


@pytest.mark.parametrize("block_rows", [1, 16, 1000])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_invert_the_dense_cumulative_distribution_for_every_cut(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, chunk_tokens: int, temperature: float
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", block_rows)
    problem = Problem()
    uniforms = _uniforms(20, 200)
    ids = sample_ids(
        problem.hidden,
        problem.weight,
        uniforms,
        vocab_size=VOCAB,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    assert ids.dtype == torch.int64
    assert torch.equal(ids, _inverted(problem.dense_logprobs(temperature), uniforms))


def test_bfloat16_states_are_drawn_from_like_the_same_numbers_in_float32() -> None:
    problem = Problem(torch.bfloat16)
    uniforms = _uniforms(20, 100)
    ids = sample_ids(problem.hidden, problem.weight, uniforms, vocab_size=VOCAB)
    exact = sample_ids(problem.hidden.float(), problem.weight.float(), uniforms, vocab_size=VOCAB)
    assert torch.equal(ids, exact)


def test_an_id_is_drawn_as_often_as_it_is_likely() -> None:
    problem = Problem(tokens=1)
    ids = sample_ids(problem.hidden, problem.weight, _uniforms(1, 40_000), vocab_size=VOCAB)
    shares = torch.bincount(ids[0], minlength=VOCAB) / 40_000
    expected = problem.dense_logprobs()[0].exp()
    four_sigma = 4 * (expected * (1 - expected) / 40_000).sqrt()
    assert ((shares - expected).abs() <= four_sigma).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_interval_never_draw_padding_or_an_impossible_id(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 2)
    logits = torch.tensor([-1e4, -1e4, 0.3, -1e4, 0.1, 0.2, -1e4, -1e4, -1e4, torch.nan])
    weight = logits.to(dtype)[:, None]
    ends = torch.tensor([[0.0, 1 - torch.finfo(dtype).eps / 2]], dtype=dtype)
    assert ends[0, 1] < 1
    assert sample_ids(torch.ones(1, 1, dtype=dtype), weight, ends, vocab_size=9).tolist() == [
        [2, 5]
    ]


def test_the_largest_number_below_one_draws_the_last_id_however_sums_are_rounded() -> None:
    problem = Problem(torch.float32, tokens=100)
    uniforms = torch.full((100, 1), 1 - 2**-53, dtype=torch.float64)
    ids = sample_ids(problem.hidden, problem.weight, uniforms, vocab_size=VOCAB)
    assert (problem.dense_logprobs()[:, -1] > -20).all()
    assert ids.unique().tolist() == [VOCAB - 1]


def test_no_tokens_give_no_draws_and_the_logits_never_exist_in_full() -> None:
    none = Problem(tokens=0)
    drawn = sample_ids(none.hidden, none.weight, _uniforms(0, 3), vocab_size=VOCAB)
    assert drawn.shape == (0, 3)
    problem = Problem(torch.float32, tokens=400)
    uniforms = _uniforms(400, 4)
    with Recorder() as recorder:
        sample_ids(problem.hidden, problem.weight, uniforms, vocab_size=VOCAB, chunk_tokens=8)
    assert recorder.products == 2 * 3 * 50  # passes, tiles, chunks
    assert recorder.largest <= 2 * 3 * 400  # two statistics; the logits are 37 * 400


@pytest.mark.parametrize("number", [1.0, -0.1, float("nan")])
def test_a_number_outside_the_unit_interval_is_named(number: float) -> None:
    problem = Problem()
    uniforms = _uniforms(20, 2)
    uniforms[3, 1] = number
    with pytest.raises(ValueError, match=rf"number {number:.1f}.* at \[3, 1\] is outside \[0, 1\)"):
        sample_ids(problem.hidden, problem.weight, uniforms, vocab_size=VOCAB)
