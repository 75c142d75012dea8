"""The verifier `code`: which program, which tests, what reward, what a teacher reads."""

import json
import time

import pytest

from megasd.rewards.programs import equal, find_program
from megasd.rewards.verifiers import check_row, verify

DOUBLE = {"entry_point": "double", "args": [4], "expected": 8}
SECRET = 918273645  # of a test; no program may find it


def judge(program: str, *tests, **metadata):
    return verify(
        "code", f"```python\n{program}\n```", None, {"tests": list(tests), **metadata}, None
    )


# ---- tests ----------------------------------------------------------------------------------


def test_scripts_are_judged_by_what_they_print_white_space_at_ends_apart():
    sums = {"input": "1 2\n3 4\n", "output": "3\n7\n"}
    program = "for line in open(0):\n    print(sum(map(int, line.split())), end=END)"
    assert judge(program.replace("END", r"' \n'"), sums) == (1.0, "correct")
    assert judge(program.replace("END", r"'\n\n'"), sums)[0] == 0.0
    assert judge(program.replace("END", r"'\r\n'") + "\nprint()", sums)[0] == 1.0
    assert judge(program.replace("END", r"'\f'"), sums)[0] == 0.0, "a form feed ends no line"


@pytest.mark.parametrize(
    "test",
    [
        DOUBLE,
        {**DOUBLE, "input": None, "output": None},  # as Parquet fills objects of different keys
        {"entry_point": "Solution().double", "args": [[1, 2]], "expected": [1, 2, 1, 2]},
        {"entry_point": "double", "args": [0.1], "expected": 0.2000000001},
        {"entry_point": "nothing", "args": [], "expected": None},
        "assert double(4) == 8",
        "assert 8 == double(4), 'a message'",
        "assert sorted(double([3, 1])) == [1, 1, 3, 3]",
        "assert double((1, 'x')) == (1, 'x', 1, 'x')",
        "assert {double(1), -3} == {2, -3}",
        "assert {double(1): None} == {2: None}",
    ],
)
def test_calls_and_asserts_are_judged_by_values(test):
    right = (
        "def double(x): return x * 2\n"
        "def nothing(): pass\n"
        "class Solution:\n    def double(self, x): return x + x\n"
        "if __name__ == '__main__': exit(1)\n"
    )
    assert judge(right, test) == (1.0, "correct")
    assert (
        judge(right.replace("* 2", "* 3").replace("x + x", "x").replace("pass", "return 1"), test)[
            0
        ]
        == 0
    )


def test_tests_may_be_json_text():
    assert (
        verify("code", "def double(x): return 2 * x", None, {"tests": json.dumps([DOUBLE])}, None)[
            0
        ]
        == 1
    )


def test_values_are_equal_as_in_python_up_to_rounding():
    assert equal(1, 1.0)
    assert equal([1.0, {"set": [2]}], [1 + 1e-9, {"set": [2]}])
    assert equal(10**400, 10**400)
    for one, other in ((1.0, 1.1), ([1], [1, 1]), (1, "1"), (None, 0), (0.5, 10**400), ({}, [])):
        assert not equal(one, other)
        assert not equal(other, one)
    assert not equal(float("nan"), float("nan"))
    assert not equal(10**18, 10**18 + 1)  # integers are exact


# ---- reward and feedback --------------------------------------------------------------------


def test_the_reward_is_the_share_of_tests_and_feedback_is_about_the_first_that_fails():
    tests = [{"entry_point": "f", "args": [n], "expected": n} for n in range(4)]
    reward, feedback = judge("def f(n):\n    return n if n < 2 else 10 // (n - 3)", *tests)
    assert reward == 0.5
    assert feedback == "2 of 4 tests passed. Test 3 failed.\nInput: f(2)\nExpected: 2\nGot: -10"


def test_an_exception_is_shown_as_python_shows_it():
    reward, feedback = judge(
        "import json\ndef double(x):\n    return json.loads(str(x) + '}')", DOUBLE
    )
    assert reward == 0.0
    assert 'File "solution.py", line 3, in double\n    return json.loads' in feedback
    assert feedback.endswith("json.decoder.JSONDecodeError: Extra data: line 1 column 2 (char 1)")
    assert 'File "decoder.py"' in feedback  # without the path of our library


@pytest.mark.parametrize(
    ("program", "feedback"),
    [
        ("def double(x) return x", "SyntaxError: expected ':'"),
        ("def double(x): return y", "NameError: name 'y' is not defined"),
        ("def other(x): pass", "NameError: name 'double' is not defined"),
        ("while True: pass", "It timed out after 0.7 s."),
        ("import time\ntime.sleep(99)", "It timed out after 0.7 s."),
        ("def double(x): return ' ' * 10**9", "It used more than 256 MB of memory.\nTraceback"),
        ("while True: print('x' * 9999)", "It wrote more than 1 MB."),
        ("import os\nos.abort()", "It was killed by signal 6."),
        ("exit(3)", "It ended with exit code 3."),
        ("def double(x): return double", "TypeError: the result is a function"),
        ("double = len", "TypeError: object of type 'int' has no len()"),
        ("def double(x):\n  return double(x)", "RecursionError: maximum recursion depth exceeded"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("x = '\\ud800'\ndef double(x): return '\\ud800'", "Got: '\\ud800'"),
        ("raise ValueError('x' * 10**5)", "xxx"),
    ],
)
def test_what_goes_wrong_is_said_in_a_few_words(program, feedback):
    reward, said = judge(program, DOUBLE, seconds_per_test=0.7, memory_mb=256)
    assert reward == 0.0
    assert feedback in said
    assert said.startswith("0 of 1 tests passed. Test 1 failed.\nInput: double(4)\nExpected: 8\n")
    assert len(said) < 2000
    assert "megasd" not in said
    assert "jail" not in said


def test_all_tests_together_have_their_time_too():
    started = time.monotonic()
    reward, feedback = judge("while True: pass", *[DOUBLE] * 50, seconds=1, seconds_per_test=0.4)
    assert time.monotonic() - started < 15.0
    assert reward == 0.0
    assert "0 of 50 tests passed" in feedback
    sleepy = "import sys, time\ndef f(s):\n    time.sleep(s)\n    return s"
    tests = [{"entry_point": "f", "args": [s], "expected": s} for s in (0, 9, 9)]
    reward, feedback = judge(sleepy, *tests, seconds=1)
    assert reward == pytest.approx(1 / 3)


# ---- forged verdicts ------------------------------------------------------------------------

FORGERIES = {
    "ends early as if all were well": "import os\nos._exit(0)",
    "exits as if all were well": "raise SystemExit(0)",
    "prints what a harness might": "print('passed', '[8, \"8\"]')\ndef double(x): pass",
    "writes results into every channel": (
        "import os\n"
        "for fd in range(64):\n"
        "    for line in (b'[true, \"\"]', b'{\"passed\": true}'):\n"
        "        try: os.write(fd, line)\n"
        "        except OSError: pass\n"
        "os._exit(0)"
    ),
    "is equal to everything": (
        "class Yes(int):\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\n"
        "def double(x): return Yes(0)"
    ),
    "patches what compares": (
        "import ast, builtins, json, sys\n"
        "builtins.all = builtins.any = lambda *a: True\n"
        "for name, module in list(sys.modules.items()):\n"
        "    for key in ('equal', 'check', 'judge', 'plain'):\n"
        "        if hasattr(module, key): setattr(module, key, lambda *a: True)\n"
        "def double(x): return None"
    ),
}


@pytest.mark.parametrize("test", [DOUBLE, "assert double(4) == 8", {"input": "4", "output": "8"}])
@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_a_verdict_cannot_be_forged(forgery, test):
    assert judge(forgery, test)[0] == 0.0


SPY = """
import gc, os, sys
def search(*_):
    found = [open(0).read(), str(sys.argv), str(dict(os.environ)), str(sys.orig_argv)]
    frame = sys._getframe()
    while frame:
        found += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    found += [repr(thing) for thing in gc.get_objects() if isinstance(thing, (dict, list, tuple))]
    for fd in range(64):
        try: found.append(str(os.pread(fd, 10**6, 0)))
        except OSError: pass
    return any(str(SECRET + 1) in text for text in found)
"""


@pytest.mark.parametrize(
    "test",
    [
        {"entry_point": "search", "args": [1], "expected": SECRET},
        f"assert search(1) == {SECRET}",
        {"input": "1", "output": str(SECRET)},
    ],
)
def test_expected_values_are_nowhere_in_the_programs_process(test):
    # The program must not hold the number itself: it adds 1.
    spy = SPY + f"SECRET = {SECRET - 1}\n"
    spy += (
        "if __name__ == '__main__': print(search())"
        if isinstance(test, dict) and "input" in test
        else ""
    )
    feedback = judge(spy, test)[1]
    assert feedback.endswith("Got: False") or feedback.endswith("Got: False\n")
    found = judge(spy.replace("[1]", "[1]").replace(f"{SECRET - 1}", f"{SECRET - 1} - 1"), test)[1]
    assert "Got: True" in found  # such a search does find what is there


# ---- the program, the row -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("print(1)", "print(1)"),
        ("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```\nso", "y = 2\n"),
        ("```python\nx = 1\n```\nExample output:\n```\n7\n```\n", "x = 1\n"),
        ("```\nx = 1\n```\n```json\n{}\n```", "x = 1\n"),
        ("```Python3\nx = '''\n  ```python\n'''\n```", "x = '''\n  ```python\n'''\n"),
        ("  ```python\n  x = 1\n  ```", "x = 1\n"),
        ("```python\nx = 1\ny =", "x = 1\ny =\n"),  # cut at the response's length
        ("``` python title=a\nx = 1\n```", "x = 1\n"),
        ("```cpp\nint x;\n```", ""),
    ],
)
def test_the_last_python_block_is_the_program(text, program):
    assert find_program(text) == program


ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    "text",
    [
        "1. Code:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
        "> ```python\n> def add(a, b):\n>     return a + b\n> ```",
        f"```python\n{ADD}```\nUsage:\n```python\nprint(add(1, 2))\n```",
        f"```python\n{ADD}```\nUsage:\n```\nadd(1, 2)\n```",
        f"```\n{ADD}```\nUsage:\n```python\nprint(add(1, 2))\n```",
        f"```python\ndef add(a, b): return 0\n```\nNo:\n```python\n{ADD}```",
        f"<think>\n```python\ndef add(a, b): return 0\n```\n</think>\n```python\n{ADD}```",
        f"```python\n{ADD}``` That is all.",
        f"~~~python\n{ADD}~~~",
        f"````python\n{ADD}````",
        '```python\ndef add(a, b):\n    """Adds.\n\n    ```\n    add(1, 2)\n    ```\n    """\n'
        "    return a + b\n```",
        "```python\ndef add(a, b):\n    s = 'x\u2028y\x0cz\x85'\n    return a + b\n```",
        f"```py3\n{ADD}```",
        f"```python3.11\n{ADD}```",
        f"```{{python}}\n{ADD}```",
        f"```{{.python .numberLines}}\n{ADD}```",
        f"```python\r\n{ADD}```\r\n".replace("\n", "\r\n"),
        f"```python\n{ADD}",
        "from operator import add",
    ],
)
def test_a_right_program_is_found_in_whatever_markdown(text):
    assert verify("code", text, None, {"tests": ["assert add(1, 2) == 3"]}, None)[0] == 1.0


def test_what_a_program_is_looked_for_in_takes_linear_time():
    started = time.monotonic()
    for part in ("```\n", "> ", "- ", "```python\nx = 1\n", "(" * 50 + "\n", "~~~\n```\n"):
        find_program(part * 5_000, {"add"})
    assert time.monotonic() - started < 10.0


def test_a_response_without_code_is_no_answer():
    assert verify("code", "```cpp\nint x;\n```", None, {"tests": [DOUBLE]}, None) == (
        0.0,
        "no answer found: the response holds no Python code",
    )
    given = "<code>```python\ndef double(x): return 2 * x\n```</code> or ```python\n1/0\n```"
    assert verify("code", given, None, {"tests": [DOUBLE]}, r"(?s)<code>(.*?)</code>")[0] == 1.0


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, "must hold `tests`"),
        ({"tests": []}, "must hold `tests`"),
        ({"tests": "[{"}, "`metadata.tests` is not JSON"),
        ({"tests": [DOUBLE, 3]}, "test 2 in `metadata.tests` must be an object or an assert"),
        ({"tests": [{"input": "1"}]}, "it holds input"),
        ({"tests": [{"input": 1, "output": "1"}]}, "`input` and `output` must be text"),
        ({"tests": [{"entry_point": "f", "args": []}]}, "it holds args, entry_point"),
        ({"tests": [{**DOUBLE, "args": {"x": 1}}]}, "`args` must be a list, not dict"),
        ({"tests": [{**DOUBLE, "entry_point": "f("}]}, "test 1 in `metadata.tests`: `entry_point`"),
        ({"tests": ["assert f(1) == g(1)"]}, "must be `assert <expression> == <literal>`"),
        ({"tests": ["assert abs(f(1) - 1) < 0.1"]}, "must be `assert <expression> == <literal>`"),
        ({"tests": ["f(1)"]}, "must be `assert <expression> == <literal>`"),
        ({"tests": ["assert f(1 == 2"]}, "test 1 in `metadata.tests` is not Python"),
        ({"tests": [DOUBLE], "seconds": 0}, "`metadata.seconds` must be a number above 0, not 0"),
        ({"tests": [DOUBLE], "memory_mb": "1"}, "`metadata.memory_mb` must be a number above 0"),
        ({"tests": [DOUBLE], "seconds": float("inf")}, "`metadata.seconds` must be"),
    ],
)
def test_rows_that_cannot_be_judged_are_named(metadata, problem):
    assert problem in str(check_row("code", None, metadata))


def test_a_good_row_is_accepted():
    tests = [DOUBLE, "assert f(1) == 2", {"input": "", "output": ""}]
    assert check_row("code", None, {"tests": tests, "seconds": 3, "memory_mb": None}) is None
