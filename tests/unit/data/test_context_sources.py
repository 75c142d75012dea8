import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest

from megasd.data.config import CONTEXT_SOURCES, ContextConfig
from megasd.data.context_sources import HEADINGS, ContextSources, marked_answer, without_thinking
from megasd.testing.tiny import tiny_tokenizer
from megasd.types import Prompt, Rollout, Verdict

TOKENIZER = tiny_tokenizer(strings=())
CORRECT = Verdict(reward=1.0, feedback="correct")
BROKEN = Verdict(reward=1.0, error="the verifier died", feedback="Traceback")
BROKEN_WRONG = Verdict(reward=0.0, error="the verifier hung", feedback="Traceback")


def wrong(reward: float = 0.0, feedback: str = "") -> Verdict:
    return Verdict(reward=reward, feedback=feedback)


def rollout(
    sample: int,
    text: str,
    *,
    group_id: int = 0,
    answer: str | None = "42",
    solution: str | None = None,
    header: str = "<|assistant|>",
    finish_reason: Literal["stop", "length"] = "stop",
) -> Rollout:
    prompt = Prompt(
        index=0,
        messages=({"role": "user", "content": "?"},),
        token_ids=np.array(TOKENIZER(f"<|user|>?{header}")["input_ids"], dtype=np.int64),
        answer=answer,
        solution=solution,
    )
    return Rollout(
        prompt=prompt,
        group_id=group_id,
        sample=sample,
        token_ids=np.array([7, 1], dtype=np.int64),
        logprobs=None,
        text=text,
        finish_reason=finish_reason,
        policy_version=0,
    )


def texts(
    batch: Sequence[tuple[Rollout, Verdict]],
    *,
    role: str = "teacher",
    step: int = 0,
    seed: int = 0,
    threshold: float = 1.0,
    pattern: str | None = None,
    **options: Any,
) -> list[str | None]:
    sources = ContextSources(
        ContextConfig(**options),
        TOKENIZER,
        success_threshold=threshold,
        answer_pattern=pattern,
        seed=seed,
    )
    rollouts, verdicts = [r for r, _ in batch], [v for _, v in batch]
    return sources.texts(role, rollouts, verdicts, step)


# ---- siblings ------------------------------------------------------------------------------


def test_a_sibling_is_the_first_other_correct_rollout_of_the_group() -> None:
    batch = [
        (rollout(3, "D"), CORRECT),  # the batch need not be in the order of the samples
        (rollout(0, "A"), wrong()),
        (rollout(1, "B"), CORRECT),
        (rollout(2, "C"), BROKEN),
        (rollout(0, "other group", group_id=1), CORRECT),
    ]
    assert texts(batch, sources=["sibling"]) == ["B", "B", "D", "B", None]
    with_self = texts(batch, sources=["sibling"], allow_self=True)
    assert with_self == ["B", "B", "B", "B", "other group"]


def test_the_success_threshold_decides_who_is_correct() -> None:
    batch = [(rollout(0, "A"), wrong(0.7)), (rollout(1, "B"), wrong(0.3))]
    assert texts(batch, sources=["sibling"], threshold=0.5) == [None, "A"]
    assert texts(batch, role="wrong[0]", threshold=0.5) == ["B", None]
    assert texts(batch, role="wrong[0]", threshold=1.0) == ["B", "A"]


def test_a_random_sibling_is_the_same_on_every_rank_and_anew_for_each_rollout_step_and_seed():
    batch = [(rollout(sample, str(sample)), CORRECT) for sample in range(32)]

    def drawn(step: int = 0, seed: int = 0) -> list[str | None]:
        return texts(batch, sources=["sibling"], sibling="random", step=step, seed=seed)

    assert drawn() == drawn()
    assert len(set(drawn())) > 10
    for other in (drawn(step=1), drawn(seed=1)):
        assert sum(a == b for a, b in zip(drawn(), other, strict=True)) < 8
    # The draw belongs to the rollout, not to its place in the batch.
    assert texts(batch[::-1], sources=["sibling"], sibling="random") == drawn()[::-1]
    # And to its row, whatever group the order of the prompts made it.
    elsewhere = [(dataclasses.replace(one, group_id=17), verdict) for one, verdict in batch]
    assert texts(elsewhere, sources=["sibling"], sibling="random") == drawn()


def test_every_sibling_can_be_drawn_but_the_rollout_itself() -> None:
    batch = [(rollout(sample, str(sample)), CORRECT) for sample in range(4)]
    seen: list[set[str | None]] = [set() for _ in batch]
    for step in range(60):
        for place, text in enumerate(
            texts(batch, sources=["sibling"], sibling="random", step=step)
        ):
            seen[place].add(text)
    assert seen == [{"0", "1", "2", "3"} - {str(sample)} for sample in range(4)]


# ---- thinking ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("no tags", "no tags"),
        ("<think>a</think>\n\nb", "b"),
        ("a <think>b</think>c<think>d</think> e", "a c e"),
        ("a<think>b", "a"),
        ("<think>a", ""),
        ("a</think>b", "b"),  # opened in the prompt
        ("<think>a<think>b</think>c", "c"),  # the thoughts mention the tag
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<think></think>", ""),
        ("a < b and <b>think</b>", "a < b and <b>think</b>"),
    ],
)
def test_thinking_is_what_stands_between_the_tags(text: str, visible: str) -> None:
    assert without_thinking(text) == visible


def test_a_sibling_shows_what_it_said_and_one_that_only_thought_is_passed_over() -> None:
    batch = [
        (rollout(0, "A"), wrong()),
        (rollout(1, "<think>so 42", finish_reason="length"), CORRECT),
        (rollout(2, "<think>so</think>\n42", finish_reason="length"), CORRECT),
    ]
    assert texts(batch, sources=["sibling"]) == ["42", "42", None]
    unstripped = texts(batch, sources=["sibling"], strip_thinking=False)
    assert unstripped == ["<think>so 42", "<think>so</think>\n42", "<think>so 42"]


@pytest.mark.parametrize(
    ("header", "visible"),
    [("<|assistant|><think>\n", "42"), ("<|assistant|><think>\n\n</think>\n\n", "so 42")],
)
def test_a_generation_header_may_have_opened_the_thinking(header: str, visible: str) -> None:
    batch = [
        (rollout(0, "A", header=header), wrong()),
        (rollout(1, "so 42", header=header), CORRECT),
        (rollout(2, "so</think>42", header=header), CORRECT),
    ]
    assert texts(batch, sources=["sibling"])[0] == visible


# ---- wrong siblings ------------------------------------------------------------------------


def test_wrong_siblings_come_lowest_reward_first_then_by_sample_and_leave_the_reader_out() -> None:
    batch = [
        (rollout(0, "A"), wrong(0.2)),
        (rollout(1, "B"), CORRECT),
        (rollout(3, "D"), wrong(0.1)),
        (rollout(2, "C"), wrong(0.1)),
        (rollout(4, "E"), BROKEN_WRONG),
    ]
    by_k = [texts(batch, role=f"wrong[{k}]") for k in range(4)]
    assert by_k[0] == ["C", "C", "C", "D", "C"]
    assert by_k[1] == ["D", "D", "A", "A", "D"]
    assert by_k[2] == [None, "A", None, None, "A"]
    assert by_k[3] == [None] * 5
    assert texts(batch, sources=["wrong_sibling"]) == by_k[0]


def test_equal_wrong_answers_count_each() -> None:
    batch = [(rollout(sample, "A"), wrong()) for sample in range(3)]
    assert texts(batch, role="wrong[1]") == ["A"] * 3


def test_of_a_wrong_sibling_the_teacher_reads_the_answer_that_the_verifier_judged() -> None:
    batch = [
        (rollout(0, "A"), CORRECT),
        (rollout(1, "ends without one"), wrong()),
        (rollout(2, "<think>#5, no, #6</think> I give up"), wrong()),
    ]
    assert texts(batch, role="wrong[0]", pattern=r"#(\d+)")[0] == "6"
    assert texts(batch, role="wrong[1]", pattern=r"#(\d+)")[0] is None
    whole = [
        texts(batch, role=f"wrong[{k}]", wrong_answer_only=False, pattern=r"#(\d+)")[0]
        for k in range(2)
    ]
    assert whole == ["ends without one", "I give up"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<answer>3</answer> <answer> 4 </answer>", "4"),
        (r"<answer>\boxed{5}</answer>", "5"),
        (r"\boxed{\frac{1}{2} <answer>6</answer>", "6"),
        ("7</answer>", ""),
        ("plain", ""),
    ],
)
def test_without_a_pattern_the_answer_is_looked_for_in_the_usual_marks(text, answer) -> None:
    assert marked_answer(text) == answer


def test_without_marks_the_last_line_is_the_answer_unless_the_response_was_cut_or_thought() -> None:
    def read(text: str, finish_reason: Literal["stop", "length"] = "stop") -> str | None:
        other = rollout(1, text, finish_reason=finish_reason)
        return texts([(rollout(0, "A"), CORRECT), (other, wrong())], role="wrong[0]")[0]

    assert read("<think>a\nb</think>\nc\nso 7\n\n") == "so 7"
    assert read("<think>a\nb") is None
    assert read("c\nso 7", "length") is None
    assert read("c\n\\boxed{7} and", "length") == "7"


# ---- feedback, answers and solutions -------------------------------------------------------


def test_feedback_is_about_the_very_rollout_and_only_where_it_failed() -> None:
    batch = [
        (rollout(0, "A"), wrong(feedback="'41' is wrong")),
        (rollout(1, "B"), CORRECT),
        (rollout(2, "C"), wrong(feedback=" ")),
        (rollout(3, "D"), BROKEN_WRONG),
        (rollout(4, "E"), wrong(feedback="no answer found")),
    ]
    expected = ["'41' is wrong", None, None, None, "no answer found"]
    assert texts(batch, sources=["feedback"]) == expected


def test_sources_combine_under_headings_in_the_order_of_the_config() -> None:
    batch = [
        (rollout(0, "A"), wrong(feedback="'41' is wrong")),
        (rollout(1, "B\nC"), CORRECT),
    ]
    sibling, feedback = "A correct attempt:\nB\nC", "Feedback on a failed attempt:\n'41' is wrong"
    assert texts(batch, sources=["sibling", "feedback"]) == [f"{sibling}\n\n{feedback}", None]
    assert texts(batch, sources=["feedback", "sibling"]) == [f"{feedback}\n\n{sibling}", None]
    # The heading depends on what is configured, not on what is there: one form per run.
    assert texts(batch[:1], sources=["sibling", "feedback"]) == [feedback]
    assert set(HEADINGS) == set(CONTEXT_SOURCES)


def test_an_answer_that_stands_in_for_the_solution_is_called_so_and_said_once() -> None:
    batch = [
        (rollout(0, "A", solution="40+2"), wrong()),
        (rollout(1, "B"), wrong()),
        (rollout(2, "C", answer=None), wrong()),
    ]
    solution, answer = "A verified solution:\n40+2", "The correct answer:\n42"
    lenient = texts(batch, sources=["solution", "sibling"], fall_back_to_answer=True)
    assert lenient == [solution, answer, None]
    both = texts(batch, sources=["answer", "solution"], fall_back_to_answer=True)
    assert both == [f"{answer}\n\n{solution}", answer, None]
    assert texts(batch, sources=["sibling"], fall_back_to_answer=True) == [None] * 3


# ---- any group -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_in_any_batch_nobody_reads_itself_and_siblings_are_what_they_are_said_to_be(seed) -> None:
    rng = random.Random(seed)
    batch = [
        (
            rollout(sample, f"{group}/{sample}", group_id=group),
            rng.choice([CORRECT, wrong(), wrong(0.5), BROKEN, BROKEN_WRONG]),
        )
        for group in range(4)
        for sample in range(rng.randrange(1, 9))
    ]
    rng.shuffle(batch)
    verdict_of = {r.text: v for r, v in batch}

    def others(r: Rollout, is_correct: bool) -> set[str]:
        return {
            other.text
            for other, v in batch
            if other.group_id == r.group_id and other.text != r.text
            if v.error is None and (v.reward >= 1.0) == is_correct
        }

    for choice in ("first", "random"):
        read = texts(batch, sources=["sibling"], sibling=choice, seed=seed)
        for (r, _), text in zip(batch, read, strict=True):
            candidates = others(r, True)
            assert text in candidates if candidates else text is None
    columns = [texts(batch, role=f"wrong[{k}]") for k in range(8)]
    for (r, _), *read in zip(batch, *columns, strict=True):
        found = [text for text in read if text is not None]
        assert read == [*found, *[None] * (8 - len(found))]
        assert sorted(found) == sorted(others(r, False))  # each of them, once
        rewards = [verdict_of[text].reward for text in found]
        assert rewards == sorted(rewards)


# ---- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "fault"),
    [(["anwser"], "'anwser'; choose among answer, "), (["answer"] * 2, "twice")],
)
def test_sources_that_say_nothing_clear_are_refused(sources: list[str], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"^context\.sources.*{fault}"):
        ContextConfig(sources=sources)


@pytest.mark.parametrize("role", ["reference", "wrong", "wrong[-1]", "wrong[x]"])
def test_a_role_without_a_context_is_refused(role: str) -> None:
    with pytest.raises(ValueError, match="no context belongs to the role"):
        texts([(rollout(0, "A"), CORRECT)], role=role)
