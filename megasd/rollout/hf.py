"""The `hf` engine: transformers' `generate` with a decoding loop of our own.

The loop differs from transformers' in three ways: each response is drawn from its own seed, so it
does not depend on what else is in the batch (up to float noise); the samples of a prompt share its
prefill; and a finished row leaves the batch at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from megasd.process import interrupt
from megasd.process.waiting import first_of, waiting_for
from megasd.rollout.engine import Request, response_text, stop_ids
from megasd.types import Rollout
from megasd.weights.bucket import Bucket, named_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Response:
    """What the decoding loop knows of one row."""

    token_ids: np.ndarray  # [T] int32
    logprobs: np.ndarray  # [T] float32
    stopped: bool  # on an end-of-sequence token, not on the length limit


class HFEngine:
    """Samples with transformers on the model that `folder`/config.json describes.

    Log-probs are float32, of the distribution that was sampled from: after temperature, top-k,
    top-p and min-p. Temperature 0 takes the most likely token; its log-prob is then that of
    temperature 1.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._device = device
        self._batch_size = batch_size
        self._stop_ids = stop_ids(folder, tokenizer)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with no_init_weights(), device:
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self._model.tie_weights()
        # The folder's defaults (a repetition penalty, say) must not change what is sampled.
        self._model.generation_config = GenerationConfig()
        self._version: int | None = None  # None: no weights, or not all of them

    def load_weights(self, buckets: Iterable[Bucket], version: int, *, check: bool = True) -> None:
        self._version = None
        self._model.to(self._device)  # wakes it
        places = _places(self._model)
        missing, errors = set(places), []
        for name, tensor in named_tensors(buckets):
            if name not in missing:
                errors.append(f"{name} is unknown or came twice")
            elif tensor.shape != places[name].shape:
                expected = tuple(places[name].shape)
                errors.append(f"{name} has shape {tuple(tensor.shape)} instead of {expected}")
            else:
                places[name].copy_(tensor)
            missing.discard(name)
        errors += [f"{name} is missing" for name in sorted(missing)]
        if errors:
            raise RuntimeError(f"weights of version {version}: " + "; ".join(errors))
        self._version = version

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        if self._version is None:
            raise RuntimeError("the engine has no complete weights: call load_weights first")
        responses: dict[int, Response] = {}
        for batch in self._batches(requests):
            names = [requests[i].name for i in batch]
            with waiting_for(lambda names=names: f"responses to {first_of(names)}"):
                answers = self._sample([requests[i] for i in batch])
            answers = [
                self._cut_at(requests[i].stop, answer)
                for i, answer in zip(batch, answers, strict=True)
            ]
            if not all(np.isfinite(answer.logprobs).all() for answer in answers):
                raise RuntimeError(
                    f"the weights of version {self._version} give log-probs that are not finite"
                )
            responses.update(zip(batch, answers, strict=True))
        return [
            Rollout(
                prompt=request.prompt,
                group_id=request.group_id,
                sample=request.sample,
                token_ids=responses[i].token_ids,
                logprobs=responses[i].logprobs,
                text=response_text(self._tokenizer, responses[i].token_ids),
                finish_reason="stop" if responses[i].stopped else "length",
                policy_version=self._version,
            )
            for i, request in enumerate(requests)
        ]

    def _cut_at(self, stop: Sequence[str], response: Response) -> Response:
        """The response up to the token that completes one of the strings."""
        for end in range(1, len(response.token_ids) + 1 if stop else 0):
            text = response_text(self._tokenizer, response.token_ids[:end])
            if any(string in text for string in stop):
                return Response(response.token_ids[:end], response.logprobs[:end], True)
        return response

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indices of requests that are sampled alike, with prompts of like length together."""

        def sampling(i: int) -> tuple[float, ...]:
            one = requests[i]
            return one.temperature, one.top_p, one.top_k, one.min_p

        def prompt(i: int) -> tuple[int, bytes]:
            token_ids = requests[i].prompt.token_ids
            return len(token_ids), token_ids.tobytes()

        order = sorted(range(len(requests)), key=lambda i: (sampling(i), prompt(i)))
        for _, alike in groupby(order, key=sampling):
            indices = list(alike)
            for start in range(0, len(indices), self._batch_size):
                yield indices[start : start + self._batch_size]

    def _sample(self, requests: Sequence[Request]) -> list[Response]:
        """One batch: requests that differ in prompt, seed and length limit only."""
        keys = [request.prompt.token_ids.tobytes() for request in requests]
        prompts = {key: r.prompt.token_ids for key, r in zip(keys, requests, strict=True)}
        place = {key: i for i, key in enumerate(prompts)}
        width = max(len(token_ids) for token_ids in prompts.values())
        input_ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for i, token_ids in enumerate(prompts.values()):
            input_ids[i, width - len(token_ids) :] = torch.from_numpy(token_ids)
            attention_mask[i, width - len(token_ids) :] = 1
        input_ids, attention_mask = self._tensor(input_ids), self._tensor(attention_mask)
        first, limit = requests[0], max(request.max_response_tokens for request in requests)
        sampling, uniforms = {"do_sample": False}, None
        if first.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": first.temperature,
                "top_p": first.top_p,
                "top_k": first.top_k,
                "min_p": first.min_p,
            }
            # One number in [0, 1) per token, from the request's own seed.
            draws = [np.random.default_rng(request.seed).random(limit) for request in requests]
            uniforms = self._tensor(np.stack(draws))
        token_ids, logprobs, lengths, stopped = self._model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                **sampling, max_new_tokens=limit, pad_token_id=0, eos_token_id=self._stop_ids
            ),
            custom_generate=partial(
                _decode,
                prompt_mask=attention_mask,
                prompt_of_row=self._tensor([place[key] for key in keys]),
                limits=self._tensor([request.max_response_tokens for request in requests]),
                uniforms=uniforms,
                stop_ids=self._tensor(self._stop_ids),
            ),
        )
        columns = (
            token_ids.int().cpu().numpy(),
            logprobs.cpu().numpy(),
            lengths.tolist(),
            stopped.tolist(),
        )
        return [
            Response(ids[:length], logprob[:length], stop)
            for ids, logprob, length, stop in zip(*columns, strict=True)
        ]

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self._device)

    @torch.no_grad()
    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        scores = []
        for token_ids in sequences:
            ids = self._tensor(token_ids)[None]
            logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
            scores.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
        return scores

    def metrics(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None:
        self._model.to("cpu")
        self._version = None

    def close(self) -> None:
        self._version = None
        self._model.to("meta")


def _places(model: Any) -> dict[str, Tensor]:
    """Where each tensor of a Hugging Face folder lies in the model in memory.

    transformers keeps the experts of a layer in one tensor and their folder has them one by one.
    """
    places: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        where, _, kind = name.rpartition(".experts.")
        if not where:
            places[name] = values
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for number, expert in enumerate(values):
            for part, rows in zip(parts, expert.chunk(len(parts)), strict=True):
                places[f"{where}.experts.{number}.{part}.weight"] = rows
    return places


def _decode(
    model: Any,
    input_ids: Tensor,
    *,
    past_key_values: Any,
    logits_processor: Any,
    prompt_mask: Tensor,
    prompt_of_row: Tensor,
    limits: Tensor,
    uniforms: Tensor | None,
    stop_ids: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loop that `generate` calls: token ids and log-probs [R, T], lengths [R], stopped [R].

    P left-padded prompts (`prompt_mask` is 1 at their tokens) are read once, then R rows continue
    them: row r the prompt `prompt_of_row[r]`, up to `limits[r]` tokens, drawn with `uniforms[r]`
    [R, T] (None: the most likely token).
    """
    # Under a name of its own because `generate` drops an attention mask that hides nothing.
    attention_mask, cache = prompt_mask, past_key_values
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    forward = partial(model, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = forward(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    cache.batch_select_indices(prompt_of_row)
    logits, attention_mask = logits[prompt_of_row], attention_mask[prompt_of_row]
    position_ids = position_ids[prompt_of_row, -1:]

    rows = torch.arange(len(limits), device=limits.device)  # those not finished yet
    token_ids = torch.empty((len(rows), int(limits.max())), dtype=torch.int64, device=rows.device)
    logprobs = torch.empty(token_ids.shape, dtype=torch.float32, device=rows.device)
    stopped, lengths = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows)
    for step in count():
        interrupt.raise_if_asked()
        scores = logits_processor(input_ids, logits[:, -1].float())  # its warpers read no ids
        distribution = torch.log_softmax(scores, dim=-1)
        if uniforms is None:
            chosen = distribution.argmax(-1)
        else:
            chosen = draw(distribution, uniforms[rows, step])
        token_ids[rows, step] = chosen
        logprobs[rows, step] = distribution.gather(1, chosen[:, None])[:, 0]
        stopped[rows] = torch.isin(chosen, stop_ids)
        lengths[rows] = step + 1

        going = ~stopped[rows] & (lengths < limits)[rows]
        if not going.all():
            keep = going.nonzero()[:, 0]
            if len(keep) == 0:
                break
            cache.batch_select_indices(keep)
            rows, chosen, attention_mask, position_ids = (
                values[keep] for values in (rows, chosen, attention_mask, position_ids)
            )
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        position_ids = position_ids + 1
        logits = forward(
            chosen[:, None], attention_mask=attention_mask, position_ids=position_ids
        ).logits
    return token_ids, logprobs, lengths, stopped


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The token at quantile `uniforms` [B], in [0, 1), of each row of `logprobs` [B, V].

    Float64 keeps the tails; a token of probability 0 is never drawn.
    """
    probabilities = logprobs.double().exp()
    cumulative = probabilities.cumsum(-1).masked_fill(probabilities == 0, -1.0)
    total = cumulative.amax(-1, keepdim=True)
    # A product that rounds up to the total would lie beyond the last token.
    target = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return (cumulative > target).to(torch.uint8).argmax(-1)
