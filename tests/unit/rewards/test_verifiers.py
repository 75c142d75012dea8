import re
import time

import pytest

from megasd.rewards.verifiers import (
    check_answer_pattern,
    check_row,
    check_verifiers,
    extract,
    verify,
)


def reward(name, response, answer, metadata=None, pattern=None):
    return verify(name, response, answer, metadata or {}, pattern)[0]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"So the result is \boxed{B}.", "B"),
        (r"\boxed{A} is wrong, hence \boxed{\text{c}}", "C"),
        (r"$\boxed{(D) Paris}$", "D"),
        ("The answer is (B).", "B"),
        ("the ANSWER is b, not C", "B"),
        ("**Answer:** **J**", "J"),
        ("Answer: A\nbecause a dog is an animal", "A"),
        ("First I thought of B. A dog barks, so C it is, I think", "C"),
        ("(e)", "E"),
        ("d", "D"),
        (r"The answer is C. \boxed{B}", "B"),
        ("A is out, B is out, so the only one left is D", "D"),
    ],
)
def test_choice_reads_the_letter_as_a_person_would(response, letter):
    verdicts = {x: reward("choice", response, x) for x in "ABCDEFGHIJ"}
    assert verdicts == {x: float(x == letter) for x in "ABCDEFGHIJ"}
    assert reward("choice", response, letter.lower()) == 1.0


@pytest.mark.parametrize("response", ["", "I'm a dog", "A dog; I see a cat", "K", "42"])
def test_choice_without_a_letter_is_no_answer(response):
    missing = "no answer found: no letter stands by itself"
    assert verify("choice", response, "A", {}, None) == (0.0, missing)


@pytest.mark.parametrize(
    "text", [r"\boxed{", "answer", "answer is", "answer:", "A", "(", "I think ", "\\boxed{\\text{"]
)
def test_choice_takes_linear_time_because_nothing_can_kill_it(text):
    started = time.perf_counter()
    for filler in (" ", "\n", "(", "*", text):
        verify("choice", text + filler * 50_000, "A", {}, None)
    assert time.perf_counter() - started < 5.0


def test_exact_forgives_white_space_only():
    assert reward("exact", "  4  +\n 5 ", "4 + 5") == 1.0
    assert reward("exact", "4+5", "4 + 5") == 0.0
    assert reward("exact", "hello", "Hello") == 0.0
    assert verify("exact", " \n", "4", {}, None) == (0.0, "no answer found")


@pytest.mark.parametrize(
    ("response", "answer", "equal"),
    [
        ("the answer is 0.5", "1/2", True),
        (r"so $\frac{1}{2}$", "0.5", True),
        (r"\boxed{\frac12}", r"\frac{1}{2}", True),
        (r"\boxed{2^{10}}", "1024", True),
        ("1000", "1,000", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"$x = 5$", "5", True),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", True),
        (r"\boxed{50\%}", "0.5", True),
        (r"\boxed{\frac{1}{3}}", "1/2", False),
        ("it is 7, no, 8", "7", False),
        (r"\boxed{3}, wait, no: \boxed{5}", "5", True),
        (r"\boxed{5}, wait, no: \boxed{3}", "5", False),
        (r"\boxed{5}, or is it \boxed{3", "5", True),
        (r"$x = \boxed{3}$ or $x = \boxed{5}$", r"\{3, 5\}", True),
    ],
)
def test_math_compares_values_not_spellings(response, answer, equal):
    assert reward("math", response, answer) == float(equal)


def test_math_reads_what_the_pattern_found_as_one_expression():
    # Alone, math-verify would take the 2 out of this plain text.
    assert reward("math", "work 3 # 2^{10}", "1024", pattern=r"#\s*(.*)") == 1.0


def test_math_without_an_answer_is_wrong_and_without_a_gold_is_an_error():
    missing = "no answer found: there is no number and no formula to read"
    assert verify("math", "I do not know", "7", {}, None) == (0.0, missing)
    with pytest.raises(ValueError, match="cannot read the row's answer"):
        verify("math", "7", r"\text{}", {}, None)


ENTRY = {"question": "1 + 2", "answer": "3", "metadata": {}}


@pytest.mark.parametrize(
    ("name", "response", "answer", "feedback"),
    [
        ("math", r"\boxed{8}", "7", "the answer '8' is wrong"),
        (
            "math",
            "I get 8",
            "7",
            r"the answer '8' is wrong; it is the last one found, for nothing is in \boxed{}",
        ),
        ("math", r"\boxed{(7, 8)}", "7", "the answer is wrong"),
        ("math", r"\boxed{17}", "7", "the answer '17' is wrong"),
        ("choice", "B or A. The answer is (B)", "A", "the answer 'B' is wrong"),
        ("exact", "paris, France", "Paris", "the answer is wrong"),
        ("exact", "New\n York  City", "new york", "the answer is wrong"),
        ("exact", "Parisian", "Paris", "the answer 'Parisian' is wrong"),
        ("reasoning_gym", "=3", "3", "the answer is only partly right"),
        ("reasoning_gym", "5", "3", "the answer '5' is wrong"),
    ],
)
def test_feedback_quotes_the_answer_given_but_never_the_rows(name, response, answer, feedback):
    """The student may have written the right answer among other things: not even then."""
    row = {"task": "chain_sum", "options": {}, "entry": ENTRY}
    reward, said = verify(name, response, answer, row, None)
    assert reward < 1.0
    assert said == feedback
    assert answer.lower() not in re.findall(r"\w+", said.lower())


def test_reasoning_gym_scores_with_the_tasks_own_scorer():
    row = {"task": "chain_sum", "options": {"max_terms": 3}, "entry": ENTRY}
    assert reward("reasoning_gym", "thinking <answer> 3 </answer> done", "3", row) == 1.0
    assert reward("reasoning_gym", "1+2=3#3", "3", row, pattern=r"#([^#]*)$") == 1.0
    assert reward("reasoning_gym", "3", "3", row) == 1.0
    assert reward("reasoning_gym", "4", "3", row) == 0.0
    # Its partial credit: the length of the answer over the length of what contains it.
    assert reward("reasoning_gym", "=3", "3", row) == 0.5
    assert verify("reasoning_gym", " ", "3", row, None) == (0.0, "no answer found")


@pytest.mark.parametrize("name", ["exact", "math", "choice", "code", "reasoning_gym"])
def test_a_response_without_a_match_of_the_pattern_is_a_wrong_answer(name):
    reward, feedback = verify(name, "B", "B", {}, r"<(\w)>")
    assert reward == 0.0
    assert "no text is marked as the answer" in feedback


def test_the_last_match_of_the_pattern_counts():
    assert extract("#1 #2 #3", r"#(\d)") == "3"
    assert extract("#x", r"#(\d)?x") is None
    assert extract(" whole ", None) == " whole "


def test_unusable_verifiers_are_found_before_the_run():
    names = [
        "math",
        "exact",
        "choice",
        "code",
        "reasoning_gym",
        "tests.unit.strange_verifiers:half",
        "maths",
        "tests.unit.no_such_module:half",
        "tests.unit.strange_verifiers:no_such_function",
        "tests.unit.strange_verifiers:os.name",
    ]
    errors = check_verifiers(names)
    assert (
        [next(name for name in names if name in error) for error in errors]
        == [
            "math",  # 'maths', which names what there is
            *names[7:],
        ]
    )
    assert (
        "no verifier is called 'maths': choose math, exact, choice, code, reasoning_gym"
        in errors[0]
    )


def test_rows_that_a_verifier_could_never_judge_are_named():
    for name in ("math", "exact", "choice"):
        assert "no `answer`" in str(check_row(name, None, {}))
        assert "no `answer`" in str(check_row(name, " ", {}))
    assert "letter A-J" in str(check_row("choice", "Paris", {}))
    assert "`task` and `entry`" in str(check_row("reasoning_gym", "3", {"task": "chain_sum"}))
    assert check_row("choice", "b", {}) is None
    assert check_row("package.module:function", None, {}) is None


def test_a_pattern_needs_to_compile_and_to_have_a_group():
    assert check_answer_pattern(None) == check_answer_pattern(r"#(\d+)") == []
    assert "data.answer_pattern" in check_answer_pattern("(")[0]
    assert "has no group" in check_answer_pattern(r"#\d+")[0]
