"""Config section of `megasd compare`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CompareConfig:
    """`compare:` read by `megasd compare` only."""

    # Config file of a run that is trained first; its RUN/hf is then model.path of all. null: none.
    warm_start: str | None = None
    threshold: float = 0.5  # held-out accuracy; the table says after how many steps it is reached

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"compare.threshold: {self.threshold} is out of range; "
                "set it above 0 and to 1 at most"
            )
