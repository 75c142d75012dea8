"""The rollout seam: what the loop knows of whatever produces responses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megasd.types import Prompt, Rollout
from megasd.weights.bucket import Bucket
from megasd.weights.hf_folder import read_hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to sample. Nothing but these values and the weights decides its tokens."""

    prompt: Prompt
    group_id: int
    sample: int  # 0 .. group_size - 1 within the group
    seed: int  # >= 0, of this response alone
    temperature: float  # 0: the most likely token always
    top_p: float  # 1: off
    top_k: int  # 0: off
    min_p: float = 0.0  # tokens below min_p times the likeliest's probability are out; 0: off
    stop: tuple[str, ...] = ()  # strings that end a response, beside the end-of-sequence tokens
    max_response_tokens: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.prompt.name} sample {self.sample}"


class EngineLostError(RuntimeError):
    """The engine died, hangs, or was discarded after a failed update; `load_weights` revives it.

    `missing` are indices into the requests of the call that have no rollout; `rollouts` are those
    of the others, in their order.
    """

    def __init__(
        self, message: str, *, rollouts: Sequence[Rollout] = (), missing: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.rollouts, self.missing = list(rollouts), list(missing)


class RolloutEngine(Protocol):
    """Lives on a rank that samples. Built without weights; they arrive by `load_weights` only."""

    def load_weights(self, buckets: Iterable[Bucket], version: int, *, check: bool = True) -> None:
        """Takes every full Hugging Face tensor; `version` travels with each rollout.

        Walks `buckets` to the end whatever is wrong, because gathering them is collective; raises
        RuntimeError after it when the weights are not complete, EngineLostError when the engine
        had to be discarded (the next call starts a new one). There are then no weights. `check`:
        compare checksums on both sides of a transfer, and raise RuntimeError naming the tensor.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in their order. Raises EngineLostError with what was saved."""
        ...

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs [T - 1] at temperature 1 of every token but the first of each [T] sequence."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the last `generate` says of itself, by the names of docs/records.md; may be {}."""
        ...

    def sleep(self) -> None:
        """Gives the accelerator's memory back while the trainer works; weights are lost."""
        ...

    def close(self) -> None:
        """Gives everything back; the engine is not used again."""
        ...


def response_text(tokenizer: "PreTrainedTokenizerBase", token_ids: np.ndarray) -> str:
    """What a verifier reads: every character that was sampled, and no special token."""
    text = tokenizer.decode(
        token_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def stop_ids(folder: str | Path, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a response, of every engine, in training and in evaluation.

    Those at which transformers' `generate` and vLLM stop: of generation_config.json, and only
    without that file of config.json, beside the tokenizer's own.
    """
    from transformers import AutoConfig, GenerationConfig

    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        said = read_hf_config(folder).get("eos_token_id")
        default = AutoConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        if said != default:
            raise ValueError(
                f"model.path: {folder}/config.json names no eos_token_id, for which vLLM would "
                f"take its family's default, {default}, and transformers none; add the model's"
            )
    else:
        try:
            said = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"model.path: {file} cannot be read ({error}); correct it") from error
    also: Any = said if isinstance(said, list) else [said]
    own: Any = tokenizer.eos_token_id
    ids = {i for i in (own, *also) if i is not None}
    if wrong := [i for i in ids if type(i) is not int or i < 0]:
        raise ValueError(
            f"model.path: eos_token_id: {wrong[0]!r} in {folder} is not a token id; correct it"
        )
    return sorted(ids)
