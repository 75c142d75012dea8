"""Config sections of the data: where prompts come from, what only the teacher reads."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ReasoningGymConfig:
    """A task of the reasoning-gym package as a data source, with its own scorer."""

    task: str = "???"
    size: int = 10_000
    seed: int = 0  # item i is drawn from seed + i: keep the seeds of two splits far apart
    options: dict[str, Any] = field(default_factory=dict)  # the task's own parameters


@dataclass(frozen=True)
class DataConfig:
    """`data:` rows with prompt (or messages), answer, optional solution and verifier."""

    files: list[str] = field(default_factory=list)  # .jsonl or .parquet
    reasoning_gym: ReasoningGymConfig | None = None  # instead of files
    verifier: str = "math"  # for rows that name none: math, exact, choice, reasoning_gym, pkg:fn
    answer_pattern: str | None = None  # regex; group 1 of its last match is the answer given
    system_prompt: str | None = None  # prepended to rows that hold no system message
    chat_template_options: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int = 4096  # a longer row is a bad row
    on_bad_row: Literal["stop", "skip"] = "stop"  # skip: leave bad rows out and count them
    shuffle: bool = True


DEFAULT_TEMPLATE = (
    "\n\nFor reference, here is what is known about the correct result:\n{context}\n\n"
    "Solve the problem in your own words, without mentioning the reference."
)
CONTEXT_SOURCES = ("answer", "solution", "sibling", "feedback", "wrong_sibling")


@dataclass(frozen=True)
class ContextConfig:
    """`context:` the privileged context, appended to the last user message."""

    # Among CONTEXT_SOURCES; none: the teacher reads the plain prompt, with weights of its own.
    sources: list[str] = field(default_factory=lambda: ["answer"])
    template: str = DEFAULT_TEMPLATE  # {context} stands for the text of the sources
    fall_back_to_answer: bool = False  # source solution: rows without one use the answer
    max_tokens: int = 4096  # of the privileged text; its end is cut, and the cut counted
    sibling: Literal["first", "random"] = "first"  # which correct rollout of the group
    allow_self: bool = False  # a correct rollout may be its own sibling
    strip_thinking: bool = True  # of other rollouts only what stands outside <think> is read
    wrong_answer_only: bool = True  # of an incorrect rollout just the answer that it gave

    def __post_init__(self) -> None:
        known = ", ".join(CONTEXT_SOURCES)
        for source in self.sources:
            if source not in CONTEXT_SOURCES:
                raise ValueError(f"context.sources: there is no {source!r}; choose among {known}")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("context.sources names a source twice; remove one of the two")
