"""From config to engine."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megasd.rollout.config import RolloutConfig
from megasd.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_engine(
    config: RolloutConfig,
    *,
    solutions: bool,  # the algorithm's `needs.solutions`: responses are read, not sampled
    folder: str | Path,  # model.path
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    device: torch.device,
) -> RolloutEngine:
    """The engine that `rollout.engine` names; each imports its library only when it is chosen."""
    if solutions:
        from megasd.rollout.solutions import SolutionsEngine

        return SolutionsEngine(tokenizer)
    if config.engine == "hf":
        from megasd.rollout.hf import HFEngine

        return HFEngine(folder, tokenizer, dtype=dtype, device=device, batch_size=config.batch_size)
    raise ValueError(f"rollout.engine: {config.engine!r} is not an engine; use hf")
