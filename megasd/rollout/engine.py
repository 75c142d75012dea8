"""The rollout seam: what the loop knows of whatever produces responses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from megasd.types import Prompt, Rollout

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
    max_response_tokens: int


class RolloutEngine(Protocol):
    """Lives on a rank that samples. Built without weights; they arrive by `load_weights` only."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes every (Hugging Face name, full tensor); `version` travels with each rollout.

        Walks `tensors` to the end whatever is wrong, because gathering them is collective; raises
        RuntimeError after it when the weights are not complete. There are then no weights.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in their order."""
        ...

    def sleep(self) -> None:
        """Gives the accelerator's memory back while the trainer works; weights are kept."""
        ...

    def wake(self) -> None:
        """Undoes `sleep`."""
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
