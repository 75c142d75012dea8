"""While a process starts, Python looks for garbage seldom; afterwards as before."""

import gc

from megasd.process import startup


def test_garbage_is_looked_for_seldom_until_the_start_is_over_and_then_as_usual() -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    startup.begin()
    try:
        assert gc.get_threshold()[0] > 10 * usual[0]
    finally:
        startup.end()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > frozen, "what is there by now is not looked through again"
    gc.unfreeze()
