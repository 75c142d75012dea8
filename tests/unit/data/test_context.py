from dataclasses import replace

import numpy as np
import pytest

from megasd.data.config import ContextConfig
from megasd.data.context import PrivilegedContext, student_view
from megasd.testing.tiny import tiny_tokenizer
from megasd.types import Prompt, Rollout, Verdict, View

# One token per character, and one per marker: lengths can be counted by eye.
TOKENIZER = tiny_tokenizer(strings=())
CONFIG = ContextConfig(sources=["solution"], template=" [{context}]", max_tokens=100)
PROBLEM = "What is 12+30?"
PLAIN = f"<|system|>s<|user|>earlier<|assistant|>ok<|eos|><|user|>{PROBLEM}<|assistant|>"


def rollout(answer: str | None = "42", solution: str | None = "10+30=40;40+2=42", sample: int = 0):
    messages = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "earlier"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": PROBLEM},
    )
    prompt = Prompt(
        index=0,
        messages=messages,
        token_ids=np.array(TOKENIZER(PLAIN)["input_ids"], dtype=np.int64),
        answer=answer,
        solution=solution,
    )
    return Rollout(
        prompt=prompt,
        group_id=0,
        sample=sample,
        token_ids=np.array([90, 3, 3, 1], dtype=np.int64),
        logprobs=None,
        text="not what the ids decode to",
        finish_reason="stop",
        policy_version=0,
    )


def context(max_context_tokens: int = 1000, **changes) -> PrivilegedContext:
    return privileged(replace(CONFIG, **changes), TOKENIZER, max_context_tokens)


def privileged(
    config: ContextConfig,
    tokenizer,
    max_context_tokens: int = 1000,
    vocab_size: int | None = None,
):
    return PrivilegedContext(
        config,
        tokenizer,
        {},
        max_context_tokens=max_context_tokens,
        success_threshold=1.0,
        answer_pattern=None,
        seed=0,
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
    )


def teacher_view(built: PrivilegedContext, rollout: Rollout) -> View | None:
    """What the teacher reads of a rollout that is its whole batch."""
    (text,) = built.texts("teacher", [rollout], [Verdict()], step=0)
    return None if text is None else built.view(rollout, text)


def read(view: View | None) -> str:
    assert view is not None
    return str(TOKENIZER.decode(view.prompt_ids))


def test_the_student_reads_the_plain_prompt_and_its_own_response():
    view = student_view(rollout())
    assert read(view) == PLAIN
    assert view.response_ids.tolist() == [90, 3, 3, 1]


@pytest.mark.parametrize(("source", "text"), [("answer", "42"), ("solution", "10+30=40;40+2=42")])
def test_the_teacher_reads_the_source_at_the_end_of_the_last_user_message(source, text):
    built = context(sources=[source])
    view = teacher_view(built, rollout())
    assert read(view) == PLAIN.replace(PROBLEM, f"{PROBLEM} [{text}]")
    assert view is not None
    assert view.response_ids.tolist() == [90, 3, 3, 1]
    assert (built.num_cut, built.num_without_room) == (0, 0)


def test_braces_in_the_privileged_text_are_text():
    view = teacher_view(context(), rollout(solution=r"\frac{1}{2} {context}"))
    assert r"[\frac{1}{2} {context}]" in read(view)


def test_a_missing_source_means_no_context_unless_the_answer_may_stand_in():
    without = rollout(solution=None)
    assert teacher_view(context(), without) is None
    lenient = context(fall_back_to_answer=True)
    assert f"{PROBLEM} [42]" in read(teacher_view(lenient, without))
    assert teacher_view(lenient, rollout(None, None)) is None
    assert teacher_view(context(sources=["answer"]), rollout(answer=" ")) is None


def test_a_long_source_loses_its_end_and_the_cut_is_counted():
    built = context(max_tokens=8)
    for sample in range(3):
        view = teacher_view(built, rollout(sample=sample))
        assert read(view) == PLAIN.replace(PROBLEM, f"{PROBLEM} [10+30=40]")
    assert teacher_view(built, rollout(solution="12345678")) is not None
    assert built.num_cut == 3


def test_the_whole_view_fits_the_context_and_only_the_source_is_cut():
    response, block = 4, len(" []")
    plain = len(rollout().prompt.token_ids)
    full = plain + block + len("10+30=40;40+2=42") + response
    for room in range(full + 1, plain, -1):
        built = context(max_context_tokens=room)
        view = teacher_view(built, rollout())
        fitting = min(16, room - plain - block - response)
        if fitting <= 0:  # an empty reference is no reference
            assert view is None
            assert (built.num_cut, built.num_without_room) == (0, 1)
        else:
            assert view is not None
            assert view.num_tokens == min(room, full)
            kept = "10+30=40;40+2=42"[:fitting]
            assert read(view) == PLAIN.replace(PROBLEM, f"{PROBLEM} [{kept}]")
            assert (built.num_cut, built.num_without_room) == (int(fitting < 16), 0)


def test_of_several_sources_only_the_end_of_the_last_is_cut():
    built = context(sources=["answer", "solution"])
    student = rollout()
    (text,) = built.texts("teacher", [student], [Verdict()], step=0)
    assert text == "The correct answer:\n42\n\nA verified solution:\n10+30=40;40+2=42"
    for keep in (len(text), len(text) - 1, len(text) - 20):
        view = context(max_tokens=keep).view(student, text)
        assert read(view) == PLAIN.replace(PROBLEM, f"{PROBLEM} [{text[:keep]}]")
        assert view is not None
        assert view.response_ids is student.token_ids


def test_a_character_of_several_tokens_is_cut_as_a_whole():
    tokenizer = byte_level_tokenizer()
    built = privileged(replace(CONFIG, max_tokens=6), tokenizer)
    view = built.view(rollout(), "ab€€")  # 2 + 3 + 3 bytes: the 6th is inside a euro sign
    assert view is not None
    assert tokenizer.decode(view.prompt_ids) == f"{PROBLEM} [ab€]"


def byte_level_tokenizer():
    """One token per byte, as the rare characters of a real byte-level vocabulary are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    return tokenizer


def test_a_group_shares_one_tokenisation(monkeypatch):
    from megasd.data import context as module

    calls = []

    def counted(*args):
        calls.append(args)
        return encode_chat(*args)

    encode_chat = module.encode_chat
    monkeypatch.setattr(module, "encode_chat", counted)
    built = context()
    views = [teacher_view(built, rollout(sample=sample)) for sample in range(8)]
    assert len(calls) == 1
    assert len({read(view) for view in views}) == 1


def test_a_template_without_a_place_for_the_context_is_refused():
    with pytest.raises(ValueError, match=r"context\.template"):
        context(template="for reference")


def test_half_of_a_character_in_what_a_verifier_said_does_not_end_the_run():
    view = context().view(rollout(), "wrong: \ud83d!")
    assert view is not None
    assert "[wrong: ?!]" in TOKENIZER.decode(view.prompt_ids)


def test_a_text_with_a_token_that_the_model_has_no_row_for_is_not_read():
    tokenizer = tiny_tokenizer(strings=("<new>",))
    built = privileged(CONFIG, tokenizer, vocab_size=len(tokenizer) - 1)
    assert built.view(rollout(), "a <new> way") is None
    assert built.view(rollout(), "an old way") is not None
    assert built.num_without_room == 1


def test_a_template_with_such_a_token_is_refused():
    config = replace(CONFIG, template="<new>{context}")
    with pytest.raises(ValueError, match=r"^context\.template: token \d+ \('<new>'\) is outside"):
        privileged(config, tiny_tokenizer(strings=("<new>",)), vocab_size=len(TOKENIZER))
