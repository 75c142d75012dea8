"""Verifiers that misbehave in every way, named by tests as "tests.unit.strange_verifiers:name".

Worker processes import this file: nothing slow at the top.
"""

import ctypes
import os
import re
import sys
import time
from pathlib import Path


def length(text, answer, metadata):
    """A good one: the number of characters, as reward and as feedback."""
    return len(text), f"{len(text)} characters"


def sleeps(text, answer, metadata):
    time.sleep(3600)


def hangs_in_c(text, answer, metadata):
    """Never lets Python run a signal handler: only the kernel can end it."""
    return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))


def kills_itself(text, answer, metadata):
    os._exit(3)


def segfaults(text, answer, metadata):
    ctypes.string_at(0)


def exits(text, answer, metadata):
    sys.exit("enough")


def raises(text, answer, metadata):
    raise KeyError("no such test case")


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def raises_unpicklable(text, answer, metadata):
    raise UnpicklableError("two", "arguments")


def returns_nan(text, answer, metadata):
    return float("nan")


def returns_nothing(text, answer, metadata):
    return None


def half(text, answer, metadata):
    return 0.5


def process_id(text, answer, metadata):
    return os.getpid()


def has_torch(text, answer, metadata):
    return "torch" in sys.modules


def writes_process_id_and_hangs(text, answer, metadata):
    Path(text).write_text(str(os.getpid()))
    return hangs_in_c(text, answer, metadata)
