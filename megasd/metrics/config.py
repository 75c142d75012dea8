"""Config section of the records."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricsConfig:
    """`metrics:` metrics.jsonl is always written."""

    console: bool = True  # a progress bar, or a line per step where there is no terminal
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online given WANDB_API_KEY
    wandb_project: str = "megasd"
