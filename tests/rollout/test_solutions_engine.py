"""The engine of supervised training replays solutions and samples nothing."""

import numpy as np
import pytest

from megasd.rollout.engine import Request
from megasd.rollout.solutions import SolutionsEngine
from megasd.testing.tiny import tiny_tokenizer
from megasd.types import Prompt

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def engine() -> SolutionsEngine:
    return SolutionsEngine(TOKENIZER)


def request(solution: str | None, max_response_tokens: int, sample: int = 0) -> Request:
    prompt = Prompt(
        index=3,
        messages=(),
        token_ids=np.array([7], dtype=np.int64),
        solution=solution,
        where="train.jsonl:4",
    )
    return Request(
        prompt=prompt,
        group_id=5,
        sample=sample,
        seed=0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_response_tokens=max_response_tokens,
    )


def test_a_response_is_the_solution_and_the_end_of_sequence_token(engine: SolutionsEngine) -> None:
    exact, other = engine.generate([request("1+2=3", 6), request("a  b .", 50, sample=1)])
    ids = TOKENIZER.convert_tokens_to_ids([*"1+2=3", "<|eos|>"])
    assert exact.token_ids.tolist() == ids
    assert exact.token_ids.dtype == np.int32
    assert (exact.finish_reason, exact.text, exact.logprobs) == ("stop", "1+2=3", None)
    assert (other.text, other.group_id, other.sample, other.prompt.index) == ("a  b .", 5, 1, 3)


def test_a_solution_that_is_too_long_is_cut_and_does_not_end(engine: SolutionsEngine) -> None:
    (rollout,) = engine.generate([request("1+2=3", 5)])
    assert rollout.token_ids.tolist() == TOKENIZER.convert_tokens_to_ids(list("1+2=3"))
    assert rollout.finish_reason == "length"
    (rollout,) = engine.generate([request("1+2=3", 2)])
    assert (rollout.text, rollout.finish_reason) == ("1+", "length")


def test_a_row_without_a_solution_is_named(engine: SolutionsEngine) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl:4: the row has no solution"):
        engine.generate([request(None, 5)])


def test_no_weights_are_ever_gathered_for_it(engine: SolutionsEngine) -> None:
    with pytest.raises(RuntimeError, match="needs no weights"):
        engine.load_weights(iter(()), version=1)
