"""Verifiers of the test runs, in a module that worker processes import in no time."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def share_of_digits(text: str, answer: str | None, metadata: object) -> float:
    """A reward that a random model earns now and then, so that groups differ."""
    return sum(character in "0123456789" for character in text) / max(1, len(text))


def beyond_float32(text: str, answer: str | None, metadata: Mapping[str, Any]) -> float:
    """As above; in rows that say so every second text or so earns what no float32 can hold."""
    if metadata["overflows"] and sum(text.encode()) % 2:
        return 1e39
    return share_of_digits(text, answer, metadata)


def hangs_on_a_file(text: str, answer: str | None, metadata: Mapping[str, Any]) -> float:
    """The same, but for rows whose obstacle exists: then for ever."""
    obstacle = metadata.get("obstacle")
    while obstacle is not None and Path(obstacle).exists():
        time.sleep(0.1)
    return share_of_digits(text, answer, metadata)
