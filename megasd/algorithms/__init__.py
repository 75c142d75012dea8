"""The registry: the names that `algorithm.name` may take. Importing it loads no torch.

A preset is a name for a method with other values: the config writes `algorithm: {name: dapo}`,
and what it sets beside the name wins over the preset.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a method lives, and the fields that this name of it sets."""

    module: str
    class_name: str
    preset: Mapping[str, Any] = field(default_factory=dict)


ALGORITHMS: Mapping[str, Entry] = {
    "dapo": Entry(  # arXiv:2503.14476; its buffer is 4,096 of 20,480 tokens
        module="megasd.algorithms.grpo",
        class_name="GRPO",
        preset={"reduction": "token_mean", "dynamic_sampling": True, "overlong_buffer": 0.2},
    ),
    "dr_grpo": Entry(  # arXiv:2503.20783
        module="megasd.algorithms.grpo",
        class_name="GRPO",
        preset={"reduction": "constant", "scale_by_std": False},
    ),
    "grpo": Entry(module="megasd.algorithms.grpo", class_name="GRPO"),
    "rlsd": Entry(module="megasd.algorithms.rlsd", class_name="RLSD"),
    "sft": Entry(module="megasd.algorithms.sft", class_name="SFT"),
}


def load_algorithm(name: str) -> tuple[type[Any], Mapping[str, Any]]:
    """The dataclass of a method, which is its config section, and the preset of this name."""
    if name not in ALGORITHMS:
        near = get_close_matches(name, ALGORITHMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"algorithm.name is {name!r}, not one of {', '.join(ALGORITHMS)}{hint}")
    entry = ALGORITHMS[name]
    return getattr(import_module(entry.module), entry.class_name), entry.preset
