"""Judges a Python program by its row's tests: the verifier `code`.

`metadata.tests` is a list (or JSON of one) of, in any mix:

- `{"input": text, "output": text}`: a script reads stdin and writes stdout; white space at the ends
  of lines is ignored, as are empty lines at the end;
- `{"entry_point": "f", "args": [...], "expected": value}`: f(*args) equals the value; the entry
  point may be an expression, e.g. "Solution().f";
- `"assert f(1) == 2"`: an expression on one side, a literal on the other.

Values are equal as in Python, except that a tuple equals a list, and floats may be off by 1e-6.
Each test is a run of its own in the sandbox. Expected values never enter it: what comes back is
compared here, so a program that forges its output has to know the answer. What remains possible is
to know the tests: a program can tell them by their inputs and answer by heart, all the more once a
teacher has read the failing one in the feedback.
"""

import ast
import builtins
import json
import math
import re
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt

from megasd.rewards import sandbox
from megasd.rewards.jail.program import plain
from megasd.rewards.sandbox import MEGABYTE, Ended, Limits

DEFAULTS = {"seconds": 10.0, "seconds_per_test": 5.0, "memory_mb": 512}
TOLERANCE = 1e-6  # relative, and absolute near 0
SHOWN_CHARACTERS = 600  # of each input, output and traceback in the feedback
_PYTHON = re.compile(r"py(thon)?[\d.]*(?![\w-])")
# Fences are the same in and outside of tags like <think>; inline text does not matter.
_MARKDOWN = MarkdownIt("commonmark").disable(["html_block", "inline"])


@dataclass(frozen=True)
class Test:
    """One run: of a script with `stdin`, or of `expression`, called with `args` if there are."""

    stdin: str
    expression: str | None
    args: list[Any] | None
    expected: Any  # text for a script, else a value as `plain` writes it
    shown: tuple[str, str]  # for the feedback: input, expected


def judge(text: str, metadata: Mapping[str, Any]) -> tuple[float, str]:
    """The share of the tests that pass, and what the first failing one did.

    Raises ValueError for metadata that `check` would refuse, SandboxError where this machine
    cannot contain a program.
    """
    tests = read_tests(metadata)
    program = find_program(text, _used_names(tests))
    if not program.strip():
        return 0.0, "no answer found: the response holds no Python code"
    options = read_options(metadata)
    deadline = time.monotonic() + options["seconds"]
    passed, first = 0, ""
    for number, test in enumerate(tests, 1):
        left = deadline - time.monotonic()
        if left <= 0:
            fault = f"not run: the tests took longer than {options['seconds']:g} s"
        else:
            seconds = min(left, options["seconds_per_test"])
            fault = _fault(program, test, Limits(seconds, int(options["memory_mb"] * MEGABYTE)))
        passed += not fault
        if fault and not first:
            given, expected = test.shown
            first = f"Test {number} failed.\nInput: {given}\nExpected: {expected}\n{fault}"
    if not first:
        return 1.0, "correct"
    return passed / len(tests), f"{passed} of {len(tests)} tests passed. {first}"


def check(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's metadata; None if nothing."""
    try:
        read_options(metadata)
        read_tests(metadata)
    except ValueError as error:
        return str(error)
    return None


# ---- the program --------------------------------------------------------------------------------


def find_program(text: str, names: Collection[str] = ()) -> str:
    """The last fenced block of Python, as CommonMark reads fences; without any the whole text.

    With `names`, which the tests use, it is the last block that defines them all, if there is one:
    a response may end with a usage example. A block without a language counts where no Python
    does. Where a block is no Python, text behind its closing fence may be why: it ends there then.
    """
    blocks = [
        (token.info.strip().strip("{.").lower(), _ended(token.content, token.markup))
        for token in _MARKDOWN.parse(text)
        if token.type == "fence"
    ]
    if not blocks:
        return text
    python = [program for info, program in blocks if _PYTHON.match(info)]
    unnamed = [program for info, program in blocks if not info]
    if names:
        for program in (*reversed(python), *reversed(unnamed)):
            if set(names) <= _defined(program):
                return program
    return next(iter([*reversed(python), *reversed(unnamed)]), "")


def _ended(program: str, fence: str) -> str:
    """What a fence with text behind it ends, in a block that is no Python with it."""
    if _tree(program) is None:
        cut = re.split(rf"^ {{0,3}}{re.escape(fence)}", program, maxsplit=1, flags=re.MULTILINE)
        if len(cut) > 1 and _tree(cut[0]) is not None:
            return cut[0]
    return program if program.endswith("\n") else program + "\n"  # cut at the response's length


def _tree(program: str) -> ast.AST | None:
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(program: str) -> set[str]:
    """Every name that the program binds."""
    tree = _tree(program)
    found: set[str] = set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    return found


def _used_names(tests: Sequence[Test]) -> set[str]:
    """What the tests call that is not Python's own."""
    expressions = [test.expression for test in tests if test.expression is not None]
    nodes = [node for text in expressions for node in ast.walk(ast.parse(text, mode="eval"))]
    return {node.id for node in nodes if isinstance(node, ast.Name)} - set(dir(builtins))


# ---- the row ------------------------------------------------------------------------------------


def read_options(metadata: Mapping[str, Any]) -> dict[str, float]:
    """The limits of a row, or their defaults. Raises ValueError."""
    options: dict[str, float] = {}
    for name, default in DEFAULTS.items():
        value = metadata.get(name)
        value = default if value is None else value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"`metadata.{name}` must be a number above 0, not {value!r}")
        options[name] = value
    return options


def read_tests(metadata: Mapping[str, Any]) -> list[Test]:
    """The row's tests. Raises ValueError, which names the test and what it lacks."""
    tests = metadata.get("tests")
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise ValueError(f"`metadata.tests` is not JSON: {error}") from error
    if not isinstance(tests, list) or not tests:
        raise ValueError(
            "`metadata` must hold `tests`, a list of at least one test, for verifier code"
        )
    return [
        _read_test(test, f"test {number} in `metadata.tests`", number)
        for number, test in enumerate(tests, 1)
    ]


def _read_test(test: Any, where: str, number: int) -> Test:
    if isinstance(test, str):
        return _read_assert(test, where)
    if not isinstance(test, Mapping):
        raise ValueError(f"{where} must be an object or an assert statement")
    # Parquet gives all objects of a list the same keys, null where there was none.
    held = {key for key, value in test.items() if value is not None} | {"expected"} & set(test)
    if {"input", "output"} <= held:
        given, output = test["input"], test["output"]
        if not (isinstance(given, str) and isinstance(output, str)):
            raise ValueError(f"{where}: `input` and `output` must be text")
        return Test(given, None, None, output, (_shown(given), _shown(output)))
    if {"entry_point", "args", "expected"} <= held:
        entry, args, expected = str(test["entry_point"]), test["args"], test["expected"]
        if not isinstance(args, list):
            raise ValueError(f"{where}: `args` must be a list, not {type(args).__name__}")
        _parse(entry, "eval", f"{where}: `entry_point`")
        call = f"{entry}({', '.join(map(repr, args))})"
        return Test("", entry, args, plain(expected), (_shown(call), _shown(repr(expected))))
    raise ValueError(
        f"{where} must hold `input` and `output`, or `entry_point`, `args` and `expected`; "
        f"it holds {', '.join(sorted(held)) or 'nothing'}"
    )


def _read_assert(text: str, where: str) -> Test:
    """The expression runs in the sandbox, the literal stays here."""
    tree = _parse(text, "exec", where)
    statement = tree.body[0] if isinstance(tree, ast.Module) and len(tree.body) == 1 else None
    comparison = statement.test if isinstance(statement, ast.Assert) else None
    if isinstance(comparison, ast.Compare) and [type(op) for op in comparison.ops] == [ast.Eq]:
        for this, other in (
            (comparison.comparators[0], comparison.left),
            (comparison.left, comparison.comparators[0]),
        ):
            try:
                expected = ast.literal_eval(this)
                value = plain(expected)
            except (ValueError, TypeError):
                continue
            expression = ast.unparse(other)
            return Test("", expression, None, value, (_shown(expression), _shown(repr(expected))))
    raise ValueError(
        f"{where} must be `assert <expression> == <literal>`, not {text!r}: what is expected "
        "must not depend on the program"
    )


def _parse(text: str, mode: str, where: str) -> ast.AST:
    try:
        return ast.parse(text.strip(), mode=mode)
    except SyntaxError as error:
        raise ValueError(f"{where} is not Python: {error}") from error


# ---- one run ------------------------------------------------------------------------------------


def _fault(program: str, test: Test, limits: Limits) -> str:
    """Why the program fails the test, in words for a teacher; "" where it passes."""
    ended = sandbox.run(
        program, stdin=test.stdin, expression=test.expression, args=test.args, limits=limits
    )
    if trouble := _trouble(ended, limits):
        return trouble
    if test.expression is None:
        same = _lines(ended.stdout) == _lines(test.expected)
        return "" if same else f"Got: {_shown(ended.stdout)}"
    try:
        value, representation = json.loads(ended.result)
        shown = _shown(str(representation))
    except (ValueError, RecursionError, TypeError):  # none, or not what our side writes
        return "Got: nothing; the program ended before the call returned"
    return "" if equal(value, test.expected) else f"Got: {shown}"


def _trouble(ended: Ended, limits: Limits) -> str:
    """What went wrong before there was a result to compare."""
    traceback = _shown(_without_paths(ended.stderr[-8 * SHOWN_CHARACTERS :].strip()), end=True)
    if ended.stopped == "time":
        return f"It timed out after {limits.seconds:.3g} s."
    if ended.stopped == "output":
        return f"It wrote more than {limits.output_bytes // MEGABYTE} MB."
    if ended.exit_code == 0:
        return ""
    memory = f"{limits.memory_bytes // MEGABYTE} MB of memory"
    if re.search(r"^MemoryError", ended.stderr, re.MULTILINE):
        return f"It used more than {memory}.\n{traceback}"
    if ended.exit_code == 128 + signal.SIGXCPU:
        return f"It used more than {limits.seconds:.3g} s of processor time."
    if ended.exit_code > 128:
        return f"It was killed by signal {ended.exit_code - 128}.\n{traceback}"
    return traceback or f"It ended with exit code {ended.exit_code}."


def equal(given: Any, expected: Any) -> bool:
    """Whether two values, as `plain` writes them, are the same up to the rounding of floats."""
    if isinstance(given, list) and isinstance(expected, list):
        pairs = zip(given, expected, strict=False)
        return len(given) == len(expected) and all(equal(a, b) for a, b in pairs)
    if isinstance(given, dict) and isinstance(expected, dict):
        return given.keys() == expected.keys() and all(equal(given[k], expected[k]) for k in given)
    if given == expected:
        return True
    if not isinstance(given, int | float) or not isinstance(expected, int | float):
        return False
    if isinstance(given, int) and isinstance(expected, int):
        return False
    try:
        return math.isclose(given, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # an integer that no float comes near
        return False


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _without_paths(traceback: str) -> str:
    return re.sub(r'File "/[^"\n]*/([^"/\n]+)"', r'File "\1"', traceback)


def _shown(text: str, end: bool = False) -> str:
    """At most SHOWN_CHARACTERS of a text, its beginning or its end."""
    if len(text) <= SHOWN_CHARACTERS:
        return text or "(nothing)" * (not end)
    return "..." + text[-SHOWN_CHARACTERS:] if end else text[:SHOWN_CHARACTERS] + "..."
