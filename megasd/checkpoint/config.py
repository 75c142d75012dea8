"""Config section of checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """`checkpoint:` one is always written at the end of the run."""

    every: int = 50  # steps; 0: only at the end
    keep: int = 2  # newest ones kept
    export_hf: bool = True  # at the end, the policy as a Hugging Face folder in RUN/hf
