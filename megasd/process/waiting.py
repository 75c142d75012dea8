"""What this process waits for, in words: kept for whoever must explain why nothing happens."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

NAMED = 5  # of many things alike
_waits: list[tuple[Callable[[], str], bool]] = []


@contextlib.contextmanager
def waiting_for(describe: Callable[[], str], *, may_take_long: bool = False) -> Iterator[None]:
    """`describe` is called by another thread, at any moment within."""
    wait = (describe, may_take_long)
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)


def all_waits() -> str:
    """Empty where nothing is named."""
    return "; ".join(describe() for describe, _ in tuple(_waits))


def may_take_long() -> bool:
    """True while it waits for something that has no usual time."""
    return any(long for _, long in tuple(_waits))


def first_of(names: Sequence[str]) -> str:
    """A few of them, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
