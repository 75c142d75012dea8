"""Config section of held-out evaluation."""

import re
from dataclasses import dataclass, field

LEAKAGE_PATTERNS = (
    r"\bthe (given|provided|reference|verified) (answer|solution)\b",
    r"\b(according to|based on) the (reference|correct attempt)\b",
)


@dataclass(frozen=True)
class EvaluationConfig:
    """`evaluation:` avg@k on held-out rows, read as the `data` section says. No files: none."""

    files: list[str] = field(default_factory=list)
    every: int = 0  # steps; 0: only before the first and after the last step
    samples: int = 8  # k, responses per prompt
    temperature: float = 1.0
    max_prompts: int | None = None  # the first so many rows; null: all
    # A response that one of these matches, whatever its case, speaks of what only a teacher read.
    leakage_patterns: list[str] = field(default_factory=lambda: list(LEAKAGE_PATTERNS))

    def __post_init__(self) -> None:
        for pattern in self.leakage_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"evaluation.leakage_patterns: {pattern!r} is not a regular expression "
                    f"({error}); correct it"
                ) from error
