"""The engine of supervised training: replays the dataset's solutions as responses."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megasd.data.tokenizer import encode_text
from megasd.rollout.engine import Request, response_text
from megasd.types import Rollout
from megasd.weights.bucket import Bucket

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SolutionsEngine:
    """A response is the prompt's solution and the end-of-sequence token.

    A longer one is cut at `max_response_tokens`, without that token. Nothing is sampled: log-probs
    are None and `policy_version`, which means nothing here, is 0.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    def load_weights(self, buckets: Iterable[Bucket], version: int, *, check: bool = True) -> None:
        raise RuntimeError("the solutions engine needs no weights: do not gather them for it")

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        return [self._replay(request) for request in requests]

    def _replay(self, request: Request) -> Rollout:
        prompt, limit = request.prompt, request.max_response_tokens
        if prompt.solution is None:
            raise ValueError(
                f"{prompt.where}: the row has no solution to train on; "
                "add one, or choose an algorithm that samples responses"
            )
        solution, end = encode_text(self._tokenizer, prompt.solution), self._tokenizer.eos_token_id
        whole = np.array([*solution, end], dtype=np.int32)
        return Rollout(
            prompt=prompt,
            group_id=request.group_id,
            sample=request.sample,
            token_ids=whole[:limit],
            logprobs=None,
            text=response_text(self._tokenizer, whole[:limit]),
            finish_reason="stop" if len(whole) <= limit else "length",
            policy_version=0,
        )

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise RuntimeError("the solutions engine has no weights to score with")

    def metrics(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None: ...

    def close(self) -> None: ...
