"""Runs the untrusted program, and one expression after it, in the process that calls `run`.

Nothing here is trusted: the program shares this process, and can write what it likes into the
result. The result is a claim about its own value, no verdict: it is compared outside.
"""

import builtins
import json
import linecache
import os
import sys
import traceback
import types
from typing import Any

NAME = "solution.py"


def run(request: dict[str, Any], result: int) -> None:
    """Executes request["program"]; writes the value of request["expression"], if any."""
    expression, args = request["expression"], request["args"]
    source = request["program"]
    # As a script sees itself; under another name the main guard does not run.
    module = types.ModuleType("__main__" if expression is None else "solution")
    sys.modules[module.__name__] = module
    sys.argv = [NAME]
    builtins.exit = builtins.quit = sys.exit  # as in any Python with its site module
    linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
    try:
        exec(compile(source, NAME, "exec"), module.__dict__)
        if expression is not None:
            value = eval(compile(expression, "test", "eval"), module.__dict__)
            value = value(*args) if args is not None else value
            with os.fdopen(result, "w") as file:
                json.dump([plain(value), repr(value)], file)  # to compare, to show
    except Exception as error:
        # The frames below are ours, and say nothing about the program.
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(error.with_traceback(trace))
        sys.exit(1)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tuples as lists, sets and dicts as marked, ordered lists.

    Raises TypeError for other kinds of values.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted((plain(item) for item in value), key=repr)}
    if isinstance(value, dict):
        items = [[plain(key), plain(item)] for key, item in value.items()]
        return {"dict": sorted(items, key=repr)}
    raise TypeError(f"the result is a {type(value).__name__}; it cannot be compared")
