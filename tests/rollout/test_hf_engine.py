"""The hf engine samples from exactly the distribution that it reports, from its own seeds only."""

import collections
import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megasd.rollout.engine import Request, response_text
from megasd.rollout.hf import HFEngine, draw
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from megasd.types import Prompt, Rollout
from megasd.weights.bucket import Bucket

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hf") / "model"
    return tiny_qwen3(target, tie=request.param, norm_spread=0.3, init_scale=0.3)


@functools.cache
def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model_of(folder).named_parameters()}


def in_buckets(weights: Mapping[str, Tensor], size: int = 3) -> Iterator[Bucket]:
    """Weights as the policy hands them out: in memory that is written again for each bucket."""
    names = list(weights)
    memory = torch.empty(sum(weight.numel() for weight in weights.values()))
    for start in range(0, len(names), size):
        some = {name: weights[name] for name in names[start : start + size]}
        bucket = Bucket.over(memory, {name: tuple(w.shape) for name, w in some.items()})
        for name, weight in some.items():
            bucket.tensors[name].copy_(weight)
        yield bucket
        memory.fill_(math.nan)


def engine_of(folder: Path, batch_size: int = 64, dtype: torch.dtype = torch.float32) -> HFEngine:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFEngine(folder, tokenizer, dtype=dtype, device=CPU, batch_size=batch_size)


def loaded_engine(folder: Path, **options: Any) -> HFEngine:
    engine = engine_of(folder, **options)
    engine.load_weights(in_buckets(weights_of(folder)), version=7)
    return engine


def prompts(*lengths: int) -> list[Prompt]:
    draws = np.random.default_rng(0)
    ids = [draws.integers(6, 90, size=length, dtype=np.int64) for length in lengths]
    return [Prompt(index=i, messages=(), token_ids=token_ids) for i, token_ids in enumerate(ids)]


def requests_for(prompts: list[Prompt], samples: int = 3, **options: Any) -> list[Request]:
    sampling: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_response_tokens": 12,
    }
    return [
        Request(
            prompt=prompt,
            group_id=prompt.index,
            sample=sample,
            seed=100 * prompt.index + sample,
            **sampling | options,
        )
        for prompt in prompts
        for sample in range(samples)
    ]


def logprobs_of(rollout: Rollout) -> np.ndarray:
    assert rollout.logprobs is not None
    return rollout.logprobs


@torch.no_grad()
def next_token_logits(model: Any, rollout: Rollout) -> Tensor:
    """[T, V] before each response token, from one unpadded forward pass without a cache."""
    ids = np.concatenate([rollout.prompt.token_ids, rollout.token_ids])
    logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0]
    return logits[len(rollout.prompt.token_ids) - 1 : -1].double()


def truncated(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Log-probs [V] after temperature, then top-k, then top-p: written with a sorted list."""
    probabilities = torch.softmax(logits / temperature, -1)
    ranked = sorted(range(len(probabilities)), key=lambda i: -probabilities[i].item())
    ranked = ranked[: top_k or None]
    total = sum(probabilities[i].item() for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += probabilities[i].item() / total
        if mass >= top_p:
            break
    result = torch.full_like(probabilities, -math.inf)
    result[kept] = torch.log(probabilities[kept] / probabilities[kept].sum())
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.7, 20, 0.9)],
)
def test_logprobs_are_those_of_the_distribution_really_sampled_from(
    folder: Path, temperature: float, top_k: int, top_p: float
) -> None:
    requests = requests_for(prompts(3, 17, 9, 1), temperature=temperature, top_k=top_k, top_p=top_p)
    rollouts = loaded_engine(folder).generate(requests)
    model = model_of(folder)
    for rollout in rollouts:
        assert logprobs_of(rollout).dtype == np.float32
        rows = next_token_logits(model, rollout)
        expected = [
            truncated(row, temperature, top_k, top_p)[token].item()
            for row, token in zip(rows, rollout.token_ids, strict=True)
        ]
        np.testing.assert_allclose(logprobs_of(rollout), expected, rtol=0, atol=1e-5)


def test_temperature_0_takes_the_most_likely_token_and_reports_temperature_1(folder: Path) -> None:
    rollouts = loaded_engine(folder).generate(requests_for(prompts(5, 2), samples=2, temperature=0))
    model = model_of(folder)
    for rollout in rollouts:
        logprobs = torch.log_softmax(next_token_logits(model, rollout), -1)
        assert rollout.token_ids.tolist() == logprobs.argmax(-1).tolist()
        np.testing.assert_allclose(logprobs_of(rollout), logprobs.amax(-1), rtol=0, atol=1e-5)


def test_tokens_come_as_often_as_the_model_says(folder: Path) -> None:
    """Chi-square of 4,000 first tokens over the 10 that top-k leaves; 99.9% quantile, 9 d.o.f."""
    (prompt,) = prompts(6)
    requests = requests_for([prompt], samples=4000, top_k=10, max_response_tokens=1)
    rollouts = loaded_engine(folder, batch_size=4000).generate(requests)
    logits = next_token_logits(model_of(folder), rollouts[0])[0]
    expected = 4000 * truncated(logits, 1.0, 10, 1.0).exp()
    observed = collections.Counter(int(rollout.token_ids[0]) for rollout in rollouts)
    assert set(observed) <= set(expected.nonzero()[:, 0].tolist())
    chi_square = sum(
        (observed[token] - count) ** 2 / count
        for token, count in enumerate(expected.tolist())
        if count
    )
    assert chi_square < 27.88


def test_a_draw_follows_the_cumulative_distribution_to_its_ends() -> None:
    tail = 1e-9
    probabilities = torch.tensor([0, 0.25, 0, 0.5, tail, 0.25 - tail, 0], dtype=torch.float64)
    quantiles = {0.0: 1, 0.24: 1, 0.25: 3, 0.74: 3, 0.75 + tail / 2: 4, 0.76: 5, 1 - 2**-53: 5}
    rows = probabilities.log().expand(len(quantiles), -1)
    drawn = draw(rows, torch.tensor(list(quantiles), dtype=torch.float64))
    assert drawn.tolist() == list(quantiles.values())


def test_a_response_depends_on_its_seed_and_not_on_its_neighbours(folder: Path) -> None:
    engine = loaded_engine(folder)
    requests = requests_for(prompts(3, 17, 9, 9))
    whole = engine.generate(requests)
    in_threes = loaded_engine(folder, batch_size=3).generate(requests)
    backwards = engine.generate(requests[::-1])[::-1]
    for rollouts in (in_threes, backwards):
        for a, b in zip(whole, rollouts, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            np.testing.assert_allclose(logprobs_of(a), logprobs_of(b), rtol=0, atol=1e-5)
    reseeded = engine.generate([replace(request, seed=request.seed + 50) for request in requests])
    assert [r.token_ids.tolist() for r in reseeded] != [r.token_ids.tolist() for r in whole]


def test_torchs_own_random_numbers_are_neither_used_nor_moved(folder: Path) -> None:
    before = torch.get_rng_state()
    loaded_engine(folder).generate(requests_for(prompts(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_rollouts_keep_the_requests_order_and_provenance(folder: Path) -> None:
    requests = requests_for(prompts(9, 2, 5))[::-1]
    requests[1:2] = [replace(requests[1], temperature=0.5)]  # another batch, the same place
    rollouts = loaded_engine(folder).generate(requests)
    for request, rollout in zip(requests, rollouts, strict=True):
        assert rollout.prompt is request.prompt
        assert (rollout.group_id, rollout.sample) == (request.group_id, request.sample)
        assert rollout.policy_version == 7
        assert rollout.token_ids.dtype == np.int32, "they travel to every rank"
    assert loaded_engine(folder).generate([]) == []


@torch.no_grad()
def preferring(folder: Path, token: int) -> dict[str, Tensor]:
    """Weights under which prompts(6, 4)[0] is surely followed by `token`, and [1] surely not."""
    model, weights = model_of(folder), weights_of(folder)
    ids = [torch.from_numpy(prompt.token_ids)[None] for prompt in prompts(6, 4)]
    yes, no = (model.model(prompt).last_hidden_state[0, -1] for prompt in ids)
    head = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[head] = weights[head].clone()
    weights[head][token] = 100 * (yes - no) / (yes - no).norm() ** 2
    return weights


def test_a_response_ends_with_the_end_of_sequence_token_and_its_text_without(folder: Path) -> None:
    engine, tokenizer = engine_of(folder), AutoTokenizer.from_pretrained(folder)
    engine.load_weights(in_buckets(preferring(folder, tokenizer.eos_token_id)), version=1)
    first, *_, last = engine.generate(requests_for(prompts(6, 4)))
    assert first.token_ids.tolist() == [tokenizer.eos_token_id]
    assert (first.finish_reason, first.text) == ("stop", "")
    assert len(last.token_ids) > 1  # a neighbour that ended did not end the batch


def test_the_folders_own_stop_tokens_end_a_response_too(folder: Path, tmp_path: Path) -> None:
    defaults = {"eos_token_id": [1, 42], "do_sample": True, "repetition_penalty": 9.0, "top_k": 1}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    engine = engine_of(tmp_path)
    engine.load_weights(in_buckets(preferring(folder, 42)), version=1)
    (rollout,) = engine.generate(requests_for(prompts(6), samples=1))
    assert (rollout.token_ids.tolist(), rollout.finish_reason) == ([42], "stop")
    # Nothing else of that file changes what is sampled.
    engine.load_weights(in_buckets(weights_of(folder)), version=2)
    requests = requests_for(prompts(6, 8))
    for ours, plain in zip(
        engine.generate(requests), loaded_engine(folder).generate(requests), strict=True
    ):
        shared = min(len(ours.token_ids), len(plain.token_ids))
        assert ours.token_ids[:shared].tolist() == plain.token_ids[:shared].tolist()


def test_each_request_has_its_own_length_limit(folder: Path) -> None:
    requests = requests_for(prompts(6), samples=3, top_k=1)  # the same tokens for all
    requests = [replace(r, max_response_tokens=n) for r, n in zip(requests, (2, 9, 5), strict=True)]
    rollouts = loaded_engine(folder).generate(requests)
    assert [len(rollout.token_ids) for rollout in rollouts] == [2, 9, 5]
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}
    assert rollouts[0].token_ids.tolist() == rollouts[1].token_ids[:2].tolist()
    assert rollouts[0].text == AutoTokenizer.from_pretrained(folder).decode(
        rollouts[0].token_ids, skip_special_tokens=True
    )


def test_new_weights_change_the_responses_and_their_version(folder: Path) -> None:
    engine, requests = loaded_engine(folder), requests_for(prompts(6))
    before = engine.generate(requests)
    weights = weights_of(folder)
    changed = {name: weight.flip(0) for name, weight in weights.items()}
    engine.load_weights(in_buckets(changed), version=8)
    after = engine.generate(requests)
    assert [r.token_ids.tolist() for r in after] != [r.token_ids.tolist() for r in before]
    assert {rollout.policy_version for rollout in after} == {8}
    engine.load_weights(in_buckets(weights), version=9)
    for a, b in zip(before, engine.generate(requests), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: v for n, v in w.items() if n != NORM}, f"{NORM} is missing"),
        (lambda w: w | {"extra": torch.zeros(1)}, "extra is unknown"),
        (lambda w: w | {NORM: torch.zeros(3)}, rf"{NORM} has shape \(3,\) instead of \(32,\)"),
    ],
)
def test_an_engine_with_incomplete_weights_does_not_answer(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    engine, requests = engine_of(folder), requests_for(prompts(3))
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(requests)
    engine.load_weights(in_buckets(weights_of(folder)), version=1)
    stream = in_buckets(change(weights_of(folder)))
    with pytest.raises(RuntimeError, match=message):
        engine.load_weights(stream, version=2)
    assert list(stream) == []  # walked to the end: the other ranks gather it
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(requests)


def test_weights_that_became_nan_are_noticed(folder: Path) -> None:
    engine = engine_of(folder)
    weights = weights_of(folder)
    engine.load_weights(in_buckets(weights | {NORM: weights[NORM] * math.nan}), version=4)
    with pytest.raises(RuntimeError, match=r"weights of version 4 .* not finite"):
        engine.generate(requests_for(prompts(3)))


def test_weights_are_gone_after_sleep_until_they_come_again_and_after_close(folder: Path) -> None:
    engine, requests = loaded_engine(folder), requests_for(prompts(3))
    before = engine.generate(requests)
    engine.sleep()
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(requests)
    engine.load_weights(in_buckets(weights_of(folder)), version=8)
    after = engine.generate(requests)
    assert [r.token_ids.tolist() for r in after] == [r.token_ids.tolist() for r in before]
    engine.close()
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(requests)


def test_scores_are_the_log_probs_of_the_tokens_that_were_given(folder: Path) -> None:
    sequences = [prompt.token_ids for prompt in prompts(2, 30)]
    for ids, scores in zip(sequences, loaded_engine(folder).score(sequences), strict=True):
        logits = model_of(folder)(torch.from_numpy(ids)[None]).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
        np.testing.assert_allclose(scores, expected.detach(), rtol=0, atol=1e-5)


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(folder: Path) -> None:
    engine, tokenizer = loaded_engine(folder), AutoTokenizer.from_pretrained(folder)
    requests = requests_for(prompts(6), samples=8)
    rollouts = engine.generate(requests)
    place = max(range(8), key=lambda i: len(rollouts[i].token_ids))
    whole = rollouts[place]
    texts = [response_text(tokenizer, whole.token_ids[:end]) for end in range(13)]
    stop = texts[6][len(texts[4]) :]  # made of two tokens
    (cut,) = engine.generate([replace(requests[place], stop=("never there", stop))])
    length = next(end for end in range(13) if stop in texts[end])
    assert (cut.text, cut.finish_reason) == (texts[length], "stop")
    assert cut.token_ids.tolist() == whole.token_ids[:length].tolist()
    np.testing.assert_allclose(logprobs_of(cut), logprobs_of(whole)[:length], rtol=0, atol=1e-5)


def test_min_p_leaves_out_what_is_far_less_likely_than_the_likeliest(folder: Path) -> None:
    engine = loaded_engine(folder)
    for rollout in engine.generate(requests_for(prompts(6, 9), min_p=0.5)):
        distribution = next_token_logits(model_of(folder), rollout).softmax(-1)
        kept = distribution >= 0.5 * distribution.amax(-1, keepdim=True)
        chosen = torch.from_numpy(rollout.token_ids)[:, None]
        assert kept.gather(1, chosen).all()
        share = (distribution * kept).sum(-1)
        expected = (distribution.gather(1, chosen)[:, 0] / share).log()
        np.testing.assert_allclose(logprobs_of(rollout), expected, rtol=0, atol=1e-5)


def test_a_model_with_experts_takes_them_one_by_one_as_its_folder_has_them(tmp_path: Path) -> None:
    folder = tiny_qwen3_moe(tmp_path / "moe", norm_spread=0.3, init_scale=0.3)
    weights: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    assert any(".experts.1.up_proj" in name for name in weights)
    engine = engine_of(folder)
    engine.load_weights(in_buckets(weights), version=1)
    ids = prompts(20)[0].token_ids
    logits = model_of(folder)(torch.from_numpy(ids)[None]).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
    np.testing.assert_allclose(engine.score([ids])[0], expected.detach(), rtol=0, atol=1e-5)


def test_bfloat16_weights_sample_with_float32_logprobs(folder: Path) -> None:
    engine = loaded_engine(folder, dtype=torch.bfloat16)
    model = copy.deepcopy(model_of(folder)).bfloat16()
    for rollout in engine.generate(requests_for(prompts(5, 11))):
        expected = torch.log_softmax(next_token_logits(model, rollout), -1)
        expected = expected.gather(1, torch.from_numpy(rollout.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs_of(rollout), expected, rtol=0, atol=0.1)
