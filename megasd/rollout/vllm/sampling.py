"""From a request to what vLLM is asked for: plain values."""

from collections.abc import Sequence
from typing import Any

from megasd.rollout.engine import Request


def asked(request: Request, stop_ids: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """Token ids of the prompt, and arguments of `SamplingParams`."""
    sampling: dict[str, Any] = {
        "temperature": request.temperature,
        "seed": request.seed,
        "max_tokens": request.max_response_tokens,
        "stop_token_ids": list(stop_ids),
        "logprobs": 0,  # of the sampled token only
    }
    if request.temperature > 0:
        sampling |= {"top_p": request.top_p, "top_k": request.top_k, "min_p": request.min_p}
    if request.stop:
        sampling["stop"] = list(request.stop)
    return request.prompt.token_ids.tolist(), sampling
