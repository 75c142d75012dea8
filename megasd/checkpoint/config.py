"""Config section of checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """`checkpoint:` one is always written when the run ends or is asked to stop."""

    every: int = 50  # steps; 0: not by steps
    minutes: float | None = 30.0  # after the last one, beside those of `every`; null: not by time
    keep: int = 2  # newest ones kept
    export_hf: bool = True  # at the end, the policy as a Hugging Face folder in RUN/hf
