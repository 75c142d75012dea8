"""Sources: which text a teacher may read about a rollout, and where there is none."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megasd.data.config import ContextConfig
from megasd.rewards.verifiers import extract, last_boxed
from megasd.types import Prompt, Rollout, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Group = Sequence[tuple[Rollout, Verdict]]
"""The rollouts of one prompt in one step with their verdicts."""

Texts = list[str | None]
"""One text for each rollout; None where there is nothing to read."""

Reader = Callable[[Group, int], Texts]
"""What every rollout of a group reads at a step."""

HEADINGS = {
    "answer": "The correct answer:",
    "solution": "A verified solution:",
    "sibling": "A correct attempt:",
    "feedback": "Feedback on a failed attempt:",
    "wrong_sibling": "An incorrect attempt:",
}
HEADER_TOKENS = 16  # enough for the end of a generation header, one token per character or not


class ContextSources:
    """The texts that each role of a teacher reads.

    A rollout is correct where its reward reaches `success_threshold`, else incorrect; one whose
    verifier failed is neither. Siblings are the other rollouts of the group, ordered by sample.

    - `answer`, `solution`: of the row; `fall_back_to_answer` lets the answer stand in.
    - `sibling`: a correct sibling, the first or one drawn by (seed, step, row, sample); with
      `allow_self` a correct rollout is among its own candidates.
    - `feedback`: what the verifier said about this very rollout, if it is incorrect. About a
      correct one it says nothing that a teacher could use (SDPO, arXiv:2601.20802, too reads the
      feedback of failed attempts).
    - `wrong_sibling`: an incorrect sibling, lowest reward first; with `wrong_answer_only` just the
      answer it gave, and siblings that gave none are passed over.

    `strip_thinking` takes the reasoning out of what is read of a sibling, and a sibling that has
    nothing else is passed over.
    """

    def __init__(
        self,
        config: ContextConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        success_threshold: float,
        answer_pattern: str | None,
        seed: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._success_threshold = success_threshold
        self._answer_pattern = answer_pattern
        self._seed = seed
        self._readers: Mapping[str, Reader] = {
            "answer": lambda group, _: [rollout.prompt.answer for rollout, _ in group],
            "solution": lambda group, _: [rollout.prompt.solution for rollout, _ in group],
            "sibling": self._siblings,
            "feedback": lambda group, _: self._feedback(group),
            "wrong_sibling": lambda group, _: self._wrong_siblings(group, 0),
        }

    def texts(
        self, role: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], step: int
    ) -> Texts:
        """What `role` reads of every rollout of the batch; groups go by `group_id`.

        `teacher` reads `config.sources`: a single one as it is, several each under a heading and
        with a blank line between them, and "" where none is configured. `wrong[k]` reads the
        k-th incorrect sibling, from 0. Raises a ValueError for any other role.
        """
        read = self._reader(role)
        groups: dict[int, list[int]] = defaultdict(list)
        for index, rollout in enumerate(rollouts):
            groups[rollout.group_id].append(index)
        texts: Texts = [None] * len(rollouts)
        for members in groups.values():
            group = [(rollouts[index], verdicts[index]) for index in members]
            for index, text in zip(members, read(group, step), strict=True):
                texts[index] = text
        return texts

    def _reader(self, role: str) -> Reader:
        if role == "teacher":
            return self._combined
        if found := re.fullmatch(r"wrong\[(\d+)\]", role):
            return lambda group, _: self._wrong_siblings(group, int(found[1]))
        raise ValueError(f"no context belongs to the role {role!r}; ask for teacher or wrong[k]")

    def _combined(self, group: Group, step: int) -> Texts:
        sources = self._config.sources
        columns = [self._readers[source](group, step) for source in sources]
        return [
            self._joined(rollout.prompt, dict(zip(sources, row, strict=True)))
            for (rollout, _), *row in zip(group, *columns, strict=True)
        ]

    def _joined(self, prompt: Prompt, texts: Mapping[str, str | None]) -> str | None:
        found: dict[str, str] = {}
        for source, text in texts.items():
            may_stand_in = source == "solution" and self._config.fall_back_to_answer
            if may_stand_in and not (text or "").strip():
                source, text = "answer", prompt.answer
            if text and text.strip():
                found[source] = text
        if not texts:
            return ""
        if len(texts) == 1:
            return next(iter(found.values()), None)
        return "\n\n".join(f"{HEADINGS[source]}\n{text}" for source, text in found.items()) or None

    def _feedback(self, group: Group) -> Texts:
        return [
            verdict.feedback if verdict.is_wrong(self._success_threshold) else None
            for _, verdict in group
        ]

    def _siblings(self, group: Group, step: int) -> Texts:
        correct = sorted(
            (rollout.sample, text)
            for rollout, verdict in group
            if verdict.is_right(self._success_threshold) and (text := self._visible_text(rollout))
        )
        return [self._sibling(rollout, correct, step) for rollout, _ in group]

    def _sibling(
        self, rollout: Rollout, correct: Sequence[tuple[int, str]], step: int
    ) -> str | None:
        may_be_read = [
            text for sample, text in correct if self._config.allow_self or sample != rollout.sample
        ]
        if not may_be_read:
            return None
        if self._config.sibling == "first":
            return may_be_read[0]
        words = [self._seed, step, rollout.prompt.index, rollout.sample]
        return may_be_read[np.random.default_rng(words).integers(len(may_be_read))]

    def _wrong_siblings(self, group: Group, k: int) -> Texts:
        read = self._answer_given if self._config.wrong_answer_only else self._visible_text
        wrong = sorted(
            (verdict.reward, rollout.sample, text)
            for rollout, verdict in group
            if verdict.is_wrong(self._success_threshold) and (text := read(rollout))
        )
        others = [
            [text for _, sample, text in wrong if sample != rollout.sample] for rollout, _ in group
        ]
        return [texts[k] if k < len(texts) else None for texts in others]

    def _visible_text(self, rollout: Rollout) -> str:
        if not self._config.strip_thinking:
            return rollout.text.strip()
        # Some chat templates open the reasoning themselves: "<think>" is then no part of the text.
        header = str(self._tokenizer.decode(rollout.prompt.token_ids[-HEADER_TOKENS:]))
        is_open = header.rstrip().endswith("<think>")
        return without_thinking("<think>" + rollout.text if is_open else rollout.text)

    def _answer_given(self, rollout: Rollout) -> str:
        """What stands where answers stand, else the last line of a response that has an end."""
        if self._answer_pattern is not None:  # looked for where the verifier looks: everywhere
            return (extract(rollout.text, self._answer_pattern) or "").strip()
        if marked := marked_answer(rollout.text):
            return marked
        is_cut = rollout.finish_reason == "length"
        return "" if is_cut else self._visible_text(rollout).rpartition("\n")[2].strip()


def without_thinking(text: str) -> str:
    """The text outside <think> ... </think>.

    A block that is never closed ends with the text, a block that was never opened starts with it;
    blocks do not nest.
    """
    visible: list[str] = []
    is_thinking = False
    for part in re.split(r"(</?think>)", text):
        if part == "<think>":
            is_thinking = True
        elif part == "</think>":
            if not is_thinking:
                visible.clear()
            is_thinking = False
        elif not is_thinking:
            visible.append(part)
    return "".join(visible).strip()


def marked_answer(text: str) -> str:
    r"""What is in the last `\boxed{}`, else between the last answer tags, else nothing."""
    if boxed := last_boxed(text):
        return boxed
    _, opening, inside = text.rpartition("</answer>")[0].rpartition("<answer>")
    return inside.strip() if opening else ""
