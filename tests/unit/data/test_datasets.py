import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megasd.data.config import DataConfig, ReasoningGymConfig
from megasd.data.datasets import load_prompts
from megasd.rewards.verifiers import verify
from megasd.testing.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(strings=())


def write(path: Path, lines: list) -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(path)


def load(data: DataConfig, **options):
    return load_prompts(data, TOKENIZER, **options)


GOOD = {"prompt": "1+1?", "answer": "2"}

BAD = [
    ('{"prompt": "1+1?", "answer": ', "not JSON"),
    ('"just a string"', "a row is a JSON object, not str"),
    ({"answer": "2"}, "has neither `prompt` nor `messages`"),
    ({**GOOD, "messages": [{"role": "user", "content": "?"}]}, "has both"),
    ({**GOOD, "prompt": 7}, "`prompt` must be a string, not int"),
    ({**GOOD, "prompt": "  "}, "the prompt is empty"),
    ({**GOOD, "prompt": "x" * 40}, "has 42 tokens, more than data.max_prompt_tokens 30"),
    ({"prompt": "1+1?"}, "no `answer`, which verifier math needs"),
    ({**GOOD, "answer": 2}, "`answer` must be a string, not int"),
    ({**GOOD, "solution": ["1"]}, "`solution` must be a string, not list"),
    ({**GOOD, "metadata": "x"}, "`metadata` must be an object, not str"),
    ({**GOOD, "verifier": "maths"}, "no verifier is called 'maths'"),
    ({**GOOD, "verifier": "no_such_package:f"}, "no_such_package:f cannot be imported"),
    ({"messages": [], "answer": "2"}, "at least one message"),
    ({"messages": ["hi"], "answer": "2"}, "message 1 must be an object"),
    ({"messages": [{"role": "bot", "content": "?"}], "answer": "2"}, "`role` must be one of"),
    ({"messages": [{"role": "user"}], "answer": "2"}, "`content` must be a string"),
    (
        {"messages": [{"role": "assistant", "content": "2"}], "answer": "2"},
        "the last message is from the assistant",
    ),
]


@pytest.fixture
def mixed(tmp_path: Path) -> DataConfig:
    """Good and bad rows in turn, after a blank line."""
    lines: list = [""]
    for bad, _ in BAD:
        lines += [GOOD, bad]
    return DataConfig(files=[write(tmp_path / "mixed.jsonl", lines)], max_prompt_tokens=30)


def test_every_bad_row_is_named_with_its_line_and_reason(mixed):
    with pytest.raises(ValueError, match="18 of 36 rows are bad") as failure:
        load(mixed)
    heading, *rows = str(failure.value).splitlines()
    assert "data.files" in heading
    assert "data.on_bad_row: skip" in heading
    assert len(rows) == len(BAD)
    for number, (row, (_, reason)) in enumerate(zip(rows, BAD, strict=True)):
        assert f"mixed.jsonl:{3 + 2 * number}: " in row
        assert reason in row


def test_skipped_rows_are_counted_and_the_others_keep_their_row_numbers(mixed):
    loaded = load(replace(mixed, on_bad_row="skip"))
    assert len(loaded.skipped) == len(BAD)
    assert [prompt.index for prompt in loaded.prompts] == list(range(0, 36, 2))
    assert loaded.prompts[1].where.endswith("mixed.jsonl:4")


def test_only_the_first_20_bad_rows_are_listed(tmp_path):
    files = [write(tmp_path / "bad.jsonl", [GOOD] + [{"prompt": "?"}] * 33)]
    with pytest.raises(ValueError, match="33 of 34 rows") as failure:
        load(DataConfig(files=files))
    lines = str(failure.value).splitlines()
    assert lines[20].strip().startswith(f"{files[0]}:21: ")
    assert lines[21].strip() == "... and 13 more"
    assert len(lines) == 22


def test_a_prompt_is_the_chat_template_with_the_generation_header(tmp_path):
    rows = [
        {**GOOD, "solution": "1+1=2", "verifier": "exact", "metadata": {"level": 3}, "id": 9},
        {
            "messages": [
                {"role": "system", "content": "own"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "answer": "2",
        },
    ]
    files = [write(tmp_path / "rows.jsonl", rows)]
    first, second = load(DataConfig(files=files, system_prompt="be brief")).prompts
    assert TOKENIZER.decode(first.token_ids) == "<|system|>be brief<|user|>1+1?<|assistant|>"
    assert (first.answer, first.solution, first.verifier) == ("2", "1+1=2", "exact")
    assert first.metadata == {"level": 3}
    assert TOKENIZER.decode(second.token_ids) == (
        "<|system|>own<|user|>a<|assistant|>b<|eos|><|user|>c<|assistant|>"
    )
    assert second.verifier == "math"


def test_chat_template_options_reach_the_template_and_its_refusal_is_a_bad_row(tmp_path):
    tokenizer = tiny_tokenizer(strings=())
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{{ messages[0].content }}{% if think %}<|assistant|>{% endif %}"
    )
    files = [write(tmp_path / "rows.jsonl", [{**GOOD, "prompt": "no"}, GOOD])]
    data = DataConfig(files=files, on_bad_row="skip", chat_template_options={"think": True})
    loaded = load_prompts(data, tokenizer)
    assert tokenizer.decode(loaded.prompts[0].token_ids) == "1+1?<|assistant|>"
    assert loaded.skipped == [f"{files[0]}:1: the chat template refuses the messages: not that"]


def test_parquet_rows_equal_jsonl_rows(tmp_path):
    rows = [
        {"prompt": "1+1?", "messages": None, "answer": "2", "metadata": {"level": 3}, "image": b""},
        {"prompt": None, "messages": [{"role": "user", "content": "2+2?"}], "answer": "4"},
        {"prompt": "3+3?", "messages": None, "answer": None},
    ]
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    jsonl = write(tmp_path / "rows.jsonl", [{k: v for k, v in r.items() if v} for r in rows])
    loaded = load(DataConfig(files=[str(parquet), jsonl], on_bad_row="skip"))
    assert [p.index for p in loaded.prompts] == [0, 1, 3, 4]
    assert [p.where for p in loaded.prompts[:2]] == [f"{parquet} row 1", f"{parquet} row 2"]
    assert loaded.skipped[0].startswith(f"{parquet} row 3: no `answer`")
    for one, other in zip(loaded.prompts[:2], loaded.prompts[2:], strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.answer, one.messages, one.metadata) == (
            other.answer,
            other.messages,
            other.metadata,
        )


def test_reasoning_gym_items_carry_what_their_scorer_needs():
    gym = ReasoningGymConfig(task="chain_sum", size=5, seed=40, options={"max_terms": 3})
    prompts = load(DataConfig(reasoning_gym=gym)).prompts
    again = load(DataConfig(reasoning_gym=replace(gym, size=3, seed=42))).prompts
    assert [p.messages for p in prompts[2:]] == [p.messages for p in again]
    for prompt in prompts:
        assert prompt.verifier == "reasoning_gym"
        response = f"<answer>{prompt.answer}</answer>"
        assert verify(prompt.verifier, response, None, prompt.metadata, None)[0] == 1.0


@pytest.mark.parametrize(
    ("gym", "sentence"),
    [
        (ReasoningGymConfig(task="chain_sums"), "data.reasoning_gym.task: .* mean chain_sum"),
        (ReasoningGymConfig(task="chain_sum", options={"min_termz": 3}), "options: .*min_termz"),
        (ReasoningGymConfig(task="chain_sum", options={"min_terms": 0}), "options: .*positive"),
        (ReasoningGymConfig(task="chain_sum", options={"size": 3}), "data.reasoning_gym.size"),
    ],
)
def test_a_reasoning_gym_task_that_does_not_exist_or_refuses_its_options(gym, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(DataConfig(reasoning_gym=gym))


def test_a_solution_can_be_required_of_every_row(tmp_path):
    files = [write(tmp_path / "rows.jsonl", [{**GOOD, "solution": "1+1=2"}, GOOD])]
    assert len(load(DataConfig(files=files)).prompts) == 2
    with pytest.raises(ValueError, match=r"rows.jsonl:2: no `solution`"):
        load(DataConfig(files=files), require_solution=True)


def test_files_that_cannot_be_read_are_all_named_with_their_key(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_text("not parquet")
    with pytest.raises(ValueError, match=r"data.files: .*broken.parquet cannot be read"):
        load(DataConfig(files=[str(broken)]))
    with pytest.raises(ValueError, match=r"evaluation\.files") as failure:
        load(DataConfig(), files=["missing.jsonl", "rows.csv"], key="evaluation.files")
    missing, unsupported = str(failure.value).splitlines()
    assert "missing.jsonl does not exist" in missing
    assert "rows.csv is neither .jsonl nor .parquet" in unsupported


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: not JSON: .*utf-8"):
        load(DataConfig(files=[str(path)]))


HALF = "\ud83d"
DEEP = json.loads("[" * 200 + "]" * 200)


@pytest.mark.parametrize(
    ("field", "row"),
    [
        ("prompt", {**GOOD, "prompt": f"half an emoji {HALF}"}),
        ("answer", {**GOOD, "answer": HALF}),
        ("solution", {**GOOD, "solution": HALF}),
        ("verifier", {**GOOD, "verifier": HALF}),
        ("metadata", {**GOOD, "metadata": {"tests": [{"stdin": HALF}]}}),
        ("metadata", {**GOOD, "metadata": {HALF: 1}}),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": HALF},
                    {"role": "user", "content": "?"},
                ],
                "answer": "2",
            },
        ),
    ],
)
def test_half_of_a_character_in_any_field_is_a_bad_row(tmp_path, field, row):
    files = [write(tmp_path / "rows.jsonl", [GOOD, row])]
    reason = f"rows.jsonl:2: `{field}` holds half of a character"
    with pytest.raises(ValueError, match=reason):
        load(DataConfig(files=files))
    assert len(load(DataConfig(files=files, on_bad_row="skip")).prompts) == 1


@pytest.mark.parametrize(
    "row",
    [
        "[" * 20_000,
        '{"prompt": "?", "answer": "2", "metadata": ' + '{"a":' * 20_000,
        json.dumps({**GOOD, "metadata": {"tree": DEEP}}),
    ],
)
def test_nesting_without_end_is_a_bad_row(tmp_path, row):
    files = [write(tmp_path / "rows.jsonl", [GOOD, row])]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*nested more than 100 deep"):
        load(DataConfig(files=files))


def test_an_error_of_any_kind_in_the_template_is_a_bad_row(tmp_path):
    tokenizer = tiny_tokenizer(strings=())
    tokenizer.chat_template = (
        "{{ messages[0].content + (1 if messages[0].content == 'no' else '') }}"
    )
    files = [write(tmp_path / "rows.jsonl", [{**GOOD, "prompt": "no"}, GOOD])]
    loaded = load_prompts(DataConfig(files=files, on_bad_row="skip"), tokenizer)
    assert len(loaded.prompts) == 1
    assert "rows.jsonl:1: the chat template fails on the messages (TypeError" in loaded.skipped[0]


def test_a_token_that_the_model_has_no_row_for_is_a_bad_row_where_it_is_used(tmp_path):
    tokenizer = tiny_tokenizer(strings=("<new>",))
    rows = [GOOD, *({**GOOD, name: "<new>"} for name in ("prompt", "answer", "solution"))]
    files = [write(tmp_path / "rows.jsonl", rows)]
    data = DataConfig(files=files, on_bad_row="skip")
    assert len(load_prompts(data, tokenizer, vocab_size=len(tokenizer)).prompts) == 4
    loaded = load_prompts(data, tokenizer, vocab_size=len(tokenizer) - 1)
    assert len(loaded.prompts) == 1
    for why, (line, name) in zip(
        loaded.skipped, [(2, "prompt"), (3, "answer"), (4, "solution")], strict=True
    ):
        assert (
            f"rows.jsonl:{line}: `{name}`: token {len(tokenizer) - 1} ('<new>') is outside" in why
        )


def test_no_rows_are_an_error_in_every_form(tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"data.files .*empty.jsonl.*no rows"):
        load(DataConfig(files=[empty]))
    with pytest.raises(ValueError, match=r"data\.files is empty"):
        load(DataConfig())
    useless = write(tmp_path / "useless.jsonl", [{"answer": "2"}])
    with pytest.raises(ValueError, match=r"1 of 1 rows are bad.*\n.*useless.jsonl:1: "):
        load(DataConfig(files=[useless], on_bad_row="skip"))
    with pytest.raises(ValueError, match="choose one source"):
        load(DataConfig(files=[empty], reasoning_gym=ReasoningGymConfig(task="chain_sum")))
