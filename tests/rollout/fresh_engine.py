"""Greedy tokens and log-probs from vLLM started from folders, without the project's engine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.rollout.vllm_models import prompts


def answer(out: Path, folders: Sequence[Path]) -> None:
    """`out` gets, for each folder, a list of [tokens, log-probs]."""
    from vllm import LLM, SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=p.token_ids.tolist()) for p in prompts()]
    answers = []
    for folder in folders:
        vllm = LLM(
            str(folder),
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=2**28,
            max_model_len=512,
            generation_config="vllm",
            disable_log_stats=True,
        )
        results = [one.outputs[0] for one in vllm.generate(inputs, sampling, use_tqdm=False)]
        answers.append([[list(one.token_ids), logprobs_of(one)] for one in results])
        vllm.llm_engine.engine_core.shutdown()
        del vllm
    out.write_text(json.dumps(answers))


def logprobs_of(output: Any) -> list[float]:
    return [d[t].logprob for t, d in zip(output.token_ids, output.logprobs, strict=True)]
