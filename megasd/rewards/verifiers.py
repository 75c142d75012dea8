"""Verifiers: pure functions that judge the text of one response.

A verifier is called as `verify(text, answer, metadata)` and returns its reward, a finite number, or
`(reward, feedback)`. `text` is group 1 of the last match of `data.answer_pattern`, or the whole
response where no pattern is set; `answer` and `metadata` are the row's. `feedback` is a short
sentence that a teacher may read. Any importable function of this form can be named in a row or in
`data.verifier` as "package.module:function"; it runs in a worker process and may raise.

Worker processes import this module: nothing here may import torch, or anything slow at the top.
"""

import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any

Outcome = tuple[float, str]  # reward, feedback
Verifier = Callable[[str, str | None, Mapping[str, Any]], float | Outcome]

NO_ANSWER: Outcome = (0.0, "no answer found")


def _outcome(reward: float, given: str, answer: str | None, read_as: str = "") -> Outcome:
    """`reward` 1 is right. Feedback quotes what was given, but never the row's answer.

    A teacher reads it where `feedback` is the context: the answer must not come in that way, not
    even in the student's own words ("Paris, France" where "Paris" is wanted).
    """
    if reward >= 1.0:
        return reward, "correct"
    fault = "is wrong" if reward <= 0.0 else "is only partly right"
    # As a word of its own: "10" does not give away the answer "1".
    gold = " ".join(str(answer or "").split())
    given = " ".join(given.split())
    if gold and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", given, re.IGNORECASE):
        return reward, f"the answer {fault}{read_as}"
    shown = given if len(given) <= 80 else given[:77] + "..."
    return reward, f"the answer {shown!r} {fault}{read_as}"


def exact(text: str, answer: str | None, metadata: Mapping[str, Any]) -> Outcome:
    """Equal to the answer, runs of white space apart."""
    given, wanted = " ".join(text.split()), " ".join(str(answer).split())
    return _outcome(float(given == wanted), given, answer) if given else NO_ANSWER


# The letters A to J, in falling order of trust. A bare "a" or "I" before a word is English, not
# a choice. Every repetition is bounded or unambiguous: these run where nothing can kill them.
_LETTER = r"([B-HJb-hj]|[AIai](?! +[a-z]))(?![\w'])"
CHOICE_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\\boxed\{\W{0,4}(?:(?:text|textbf|mathrm|mathbf)\{)?\W{0,2}([A-Ja-j])\s?[).:}]",
        r"(?i:\banswer)(?i:\s+is\b|\s*:)[\s:*$(\[\"']*" + _LETTER,
        r"(?<![\w'])(?:\(?([A-Ja-j])\)|([B-HJ]|[AI](?! +[a-z]))(?![\w']))|^\s*([a-j])[.\s]*$",
    )
)


def choice(text: str, answer: str | None, metadata: Mapping[str, Any]) -> Outcome:
    r"""The same letter A-J: the last \boxed{B}, else "answer is (B)", else letter by itself."""
    for pattern in CHOICE_PATTERNS:
        if matches := list(pattern.finditer(text)):
            given = matches[-1].group(matches[-1].lastindex or 0).upper()
            return _outcome(float(given == str(answer).strip().upper()), given, answer)
    return 0.0, "no answer found: no letter stands by itself"


def math(text: str, answer: str | None, metadata: Mapping[str, Any]) -> Outcome:
    """Mathematically equal to the answer, as math-verify reads both.

    Its own timeouts use signals and score 0 in silence. They are off (0) here, and a process that
    takes too long is killed by the Scorer.
    """
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about the timeouts
    gold = math_verify.parse(boxed(str(answer)), parsing_timeout=0)
    if not gold:
        raise ValueError(f"math-verify cannot read the row's answer {answer!r}")
    given = math_verify.parse(text, parsing_timeout=0)
    if not given:
        return 0.0, "no answer found: there is no number and no formula to read"
    equal = math_verify.verify(gold, given, timeout_seconds=0)
    if not equal and text.count("\\boxed") > 1:  # read as one set; or the last corrects the others
        given = math_verify.parse(boxed(last_boxed(text)), parsing_timeout=0) or given
        equal = math_verify.verify(gold, given, timeout_seconds=0)
    read_as = "" if "\\boxed" in text else r"; it is the last one found, for nothing is in \boxed{}"
    return _outcome(float(equal), str(given[-1]), answer, read_as)


def boxed(expression: str) -> str:
    r"""`\boxed{expression}`: how math-verify is told that the whole string is one answer."""
    return expression if "\\boxed" in expression else f"\\boxed{{{expression}}}"


def last_boxed(text: str) -> str:
    r"""What is in the last `\boxed{}` that is closed; nothing without one. In linear time."""
    opened: list[int | None] = []  # where a box begins, None for any other brace
    last = (-1, "")
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace[0] != "}":
            opened.append(None if brace[0] == "{" else brace.end())
        elif opened and (begin := opened.pop()) is not None:
            last = max(last, (begin, text[begin : brace.start()].strip()))
    return last[1]


def reasoning_gym(text: str, answer: str | None, metadata: Mapping[str, Any]) -> Outcome:
    """The score of the task's own `score_answer`, on the text between <answer> tags if any."""
    from reasoning_gym.utils import extract_answer

    given = extract_answer(text)
    given = text.strip() if given is None else given
    if not given:
        return NO_ANSWER
    options = json.dumps(metadata.get("options", {}), sort_keys=True)
    task = _reasoning_gym_task(metadata["task"], options)
    reward = float(task.score_answer(given, dict(metadata["entry"])))
    return _outcome(reward, given, answer or metadata["entry"].get("answer"))


@cache
def _reasoning_gym_task(task: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(options))


def code(text: str, answer: str | None, metadata: Mapping[str, Any]) -> Outcome:
    """The share of the row's tests that the Python program in the text passes, in a sandbox."""
    from megasd.rewards import programs

    return programs.judge(text, metadata)


BUILT_IN: Mapping[str, Verifier] = {
    "math": math,
    "exact": exact,
    "choice": choice,
    "code": code,
    "reasoning_gym": reasoning_gym,
}
PACKAGES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}


@cache
def find_verifier(name: str) -> Verifier:
    """The verifier called `name`. Raises ValueError, or what importing its module raises."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, function = name.partition(":")
    if not (module and separator and function):
        raise ValueError(
            f"no verifier is called {name!r}: choose {', '.join(BUILT_IN)} or "
            "package.module:function"
        )
    verifier: Verifier = attrgetter(function)(importlib.import_module(module))
    if not callable(verifier):
        raise ValueError(f"verifier {name} is not callable")
    return verifier


def check_verifiers(names: Iterable[str]) -> list[str]:
    """Why the named verifiers cannot be used, a sentence each. Imports the callables' modules."""
    errors = []
    for name in dict.fromkeys(names):
        package = PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            errors.append(f"verifier {name} needs the package {package}, which is not installed")
            continue
        if name == "code":
            from megasd.rewards import sandbox

            if fault := sandbox.check():
                errors.append(f"verifier code: {fault}")
            continue
        try:
            find_verifier(name)
        except ValueError as error:
            errors.append(str(error))
        except Exception as error:  # a user's module may raise anything while it is imported
            errors.append(f"verifier {name} cannot be imported: {type(error).__name__}: {error}")
    return errors


def check_row(name: str, answer: str | None, metadata: Mapping[str, Any]) -> str | None:
    """Why the verifier called `name` could never judge such a row; None where it can."""
    if name in ("math", "exact", "choice") and not (answer or "").strip():
        return f"no `answer`, which verifier {name} needs"
    if name == "choice" and not re.fullmatch(r"\s*[A-Ja-j]\s*", str(answer)):
        return f"`answer` must be a letter A-J for verifier choice, not {answer!r}"
    if name == "reasoning_gym" and not {"task", "entry"} <= set(metadata):
        return "`metadata` must hold `task` and `entry` for verifier reasoning_gym"
    if name == "code":
        from megasd.rewards import programs

        return programs.check(metadata)
    return None


def check_answer_pattern(pattern: str | None) -> list[str]:
    """What is wrong with `data.answer_pattern`, a sentence each."""
    if pattern is None:
        return []
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"data.answer_pattern: {pattern!r} is not a regular expression: {error}."]
    if groups < 1:
        return [f"data.answer_pattern: {pattern!r} has no group; put the answer in parentheses."]
    return []


def extract(text: str, pattern: str | None) -> str | None:
    """Group 1 of the last match of `pattern`, None without a match; all of it without a pattern."""
    if pattern is None:
        return text
    matches = list(re.finditer(pattern, text))
    return matches[-1].group(1) if matches else None


def verify(
    name: str, response: str, answer: str | None, metadata: Mapping[str, Any], pattern: str | None
) -> Outcome:
    """Reward and feedback of one response. Raises what the verifier raises.

    No answer to be found in the response is a wrong answer, not an error.
    """
    text = extract(response, pattern)
    if text is None:
        return 0.0, "no answer found: no text is marked as the answer, as data.answer_pattern asks"
    if name == "math" and pattern is not None:
        text = boxed(text)  # what the pattern found is an expression, not prose
    outcome = find_verifier(name)(text, answer, metadata)
    reward, feedback = outcome if isinstance(outcome, tuple) else (outcome, "")
    return float(reward), str(feedback)
