"""Views: what the student reads, and what a teacher reads on top of it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from megasd.data.config import ContextConfig
from megasd.data.context_sources import ContextSources
from megasd.data.sources import encodable
from megasd.data.tokenizer import encode_chat, encode_text, outside_vocabulary
from megasd.types import Rollout, Verdict, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def student_view(rollout: Rollout) -> View:
    """The plain prompt and the response."""
    return View(prompt_ids=rollout.prompt.token_ids, response_ids=rollout.token_ids)


class PrivilegedContext:
    """Builds the teacher's views, in two steps.

    `texts` decides what a role reads and who is without context; it is cheap. `view` puts such a
    text into `config.template` at the end of the last user message, under the chat template with
    the generation header; the response ids are the rollout's own, never tokenised again. All roles
    share the template: contrasted contexts differ in nothing but their text.

    Two budgets hold: `config.max_tokens` for the text, and `max_context_tokens` for the whole view.
    Only the end of the text is ever cut: where not one of its tokens fits, there is no view.

    `num_cut` and `num_without_room` count views since this object was made.
    """

    def __init__(
        self,
        config: ContextConfig,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template_options: Mapping[str, Any],
        *,
        max_context_tokens: int,
        success_threshold: float,
        answer_pattern: str | None,
        seed: int,
        vocab_size: int,
    ) -> None:
        if "{context}" not in config.template:
            raise ValueError("context.template must hold {context}, where the privileged text goes")
        if not tokenizer.is_fast:
            raise ValueError(
                "model.path: the tokenizer has no fast form, which cutting a privileged context "
                "needs; convert it to a tokenizer.json."
            )
        said = encode_text(tokenizer, config.template)
        if problem := outside_vocabulary(tokenizer, said, vocab_size):
            raise ValueError(f"context.template: {problem}; take it out")
        self.num_cut = 0
        self.num_without_room = 0
        self._config = config
        self._tokenizer = tokenizer
        self._options = chat_template_options
        self._max_context_tokens = max_context_tokens
        self._vocab_size = vocab_size
        self._sources = ContextSources(
            config,
            tokenizer,
            success_threshold=success_threshold,
            answer_pattern=answer_pattern,
            seed=seed,
        )
        # The rollouts of a group mostly share their privileged text.
        self._encode = lru_cache(maxsize=1024)(self._encode_uncached)

    def texts(
        self, role: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], step: int
    ) -> list[str | None]:
        """The privileged text of every rollout; None: without context. See `ContextSources`."""
        return self._sources.texts(role, rollouts, verdicts, step)

    def view(self, rollout: Rollout, text: str) -> View | None:
        """The teacher's view of `rollout` with `text`; None where not one token of it fits.

        Nor is there one where the text, a sibling's or a verifier's, has a token that the model
        has no row for: those of the data have been refused.
        """
        text = encodable(text)
        messages = tuple((m["role"], m["content"]) for m in rollout.prompt.messages)
        room = self._max_context_tokens - len(rollout.token_ids)
        keep = self._config.max_tokens
        while True:
            prompt_ids, num_kept, is_cut = self._encode(messages, text, keep)
            excess = len(prompt_ids) - room
            if excess <= 0:
                break
            # Each round keeps at least one token less; merges at the cut can cost a second round.
            keep = num_kept - excess
            if keep <= 0:
                self.num_without_room += 1
                return None
        if outside_vocabulary(self._tokenizer, prompt_ids, self._vocab_size):
            self.num_without_room += 1
            return None
        self.num_cut += is_cut
        return View(prompt_ids=prompt_ids, response_ids=rollout.token_ids)

    def _encode_uncached(
        self, messages: tuple[tuple[str, str], ...], text: str, keep: int
    ) -> tuple[np.ndarray, int, bool]:
        """Teacher prompt with the first `keep` tokens of `text`; how many it has; was it cut."""
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        is_cut = len(offsets) > keep
        if is_cut:
            # Where the next token starts, not where the last one ends: a character that is cut
            # in two by byte-level tokens is left out.
            text = text[: offsets[keep][0]]
        *earlier, (role, content) = messages
        content += self._config.template.replace("{context}", text)
        chat = [{"role": r, "content": c} for r, c in (*earlier, (role, content))]
        prompt_ids = encode_chat(self._tokenizer, chat, self._options)
        return prompt_ids, min(keep, len(offsets)), is_cut
