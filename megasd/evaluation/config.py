"""Config section of held-out evaluation."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvaluationConfig:
    """`evaluation:` avg@k on held-out rows, read as the `data` section says. No files: none."""

    files: list[str] = field(default_factory=list)
    every: int = 0  # steps; 0: only before the first and after the last step
    samples: int = 8  # k, responses per prompt
    temperature: float = 1.0
    max_prompts: int | None = None  # the first so many rows; null: all
