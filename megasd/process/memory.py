"""Memory that this process holds without using it."""

import gc

import torch


def give_back_cached_memory() -> None:
    """To the GPU, where others may take it: torch keeps what it has freed for its own next use."""
    gc.collect()
    torch.cuda.empty_cache()
