"""The first seconds of a process: hundreds of modules are imported, and what they make stays."""

import gc

_USUAL = gc.get_threshold()


def begin() -> None:
    """Look for garbage seldom: to look through all that stays again and again is a fifth of it."""
    gc.set_threshold(100_000, 10, 10)


def end() -> None:
    """Look for it as Python does, but not among what is there by now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_USUAL)
