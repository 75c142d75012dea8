import json
import subprocess
import sys
from pathlib import Path

import pytest

from megasd.data.tokenizer import (
    UnusableTextError,
    check_chats,
    check_tokenizer_files,
    encode_chat,
    load_tokenizer,
)
from megasd.testing.tiny import CHAT_TEMPLATE, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_tokenizer_is_loaded_and_encodes_a_chat(folder):
    tokenizer = load_tokenizer(str(folder))
    messages = [{"role": "user", "content": "hi"}]
    ids = encode_chat(tokenizer, messages, {})
    assert ids.dtype == "int64"
    assert tokenizer.decode(ids) == "<|user|>hi<|assistant|>"
    assert check_tokenizer_files(str(folder)) == []


def test_a_chat_template_may_stand_in_the_tokenizer_config(folder):
    template = folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"chat_template": template.read_text()}
    config.write_text(json.dumps(settings))
    template.unlink()
    assert check_tokenizer_files(str(folder)) == []


def test_missing_files_are_all_named_at_once(tmp_path):
    errors = check_tokenizer_files(str(tmp_path))
    assert [error.startswith("model.path: ") for error in errors] == [True, True]
    assert "holds no tokenizer" in errors[0]
    assert "no chat template" in errors[1]
    with pytest.raises(ValueError, match=r"holds no tokenizer[\s\S]*no chat template"):
        load_tokenizer(str(tmp_path))
    assert "is not a folder" in check_tokenizer_files(str(tmp_path / "none"))[0]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "{", "is not JSON"),
    ],
)
def test_a_broken_file_is_one_sentence(folder, file, content, reason):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=f"model.path: .*{reason}"):
        load_tokenizer(str(folder))


NAMED = [{"name": "rag", "template": "{{ messages }}"}]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "has no chat template"),
        ("", "has an empty chat template"),
        (" \n", "has an empty chat template"),
        (NAMED, "has several chat templates and none that is called default"),
        ([*NAMED, {"name": "default", "template": ""}], "has an empty chat template"),
        ({}, "has an empty chat template"),
    ],
)
def test_a_chat_template_that_is_there_in_name_only_is_found_in_the_files(
    folder, template, problem
):
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    (error,) = check_tokenizer_files(str(folder))
    assert error.startswith("model.path: ")
    assert problem in error


def test_a_list_of_templates_with_a_default_is_usable_and_a_file_beside_it_wins(folder):
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    both = [*NAMED, {"name": "default", "template": "{{ messages[0].content }}!"}]
    config.write_text(json.dumps(settings | {"chat_template": both}))
    (folder / "chat_template.jinja").rename(folder / "kept")
    assert check_tokenizer_files(str(folder)) == []
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(encode_chat(tokenizer, messages, {})) == "hi!"
    (folder / "kept").rename(folder / "chat_template.jinja")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(encode_chat(tokenizer, messages, {})) == "<|user|>hi<|assistant|>"
    (folder / "chat_template.jinja").write_text("")
    assert "an empty chat template" in check_tokenizer_files(str(folder))[0]


@pytest.mark.parametrize(
    ("template", "options", "reason"),
    [
        ("{{ raise_exception('not that') }}", {}, "the chat template refuses the messages: not"),
        ("{% if %}", {}, "the chat template refuses the messages: "),
        ("{{ messages + 1 }}", {}, r"fails on the messages \(TypeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, r"\(RecursionError: "),
        ("{{ messages[0].content }}", {"tokenize": False}, r"fails on the messages \(ValueError"),
        ("{{ '' }}", {}, "the chat template makes an empty prompt"),
    ],
)
def test_whatever_goes_wrong_in_a_template_is_one_kind_of_error(template, options, reason):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UnusableTextError, match=reason):
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}], options)


def test_a_template_that_writes_nothing_is_named_before_any_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{% endfor %}"
    with pytest.raises(ValueError, match=r"model\.path: .*empty prompt.*write a chat template"):
        check_chats(tokenizer, {}, len(tokenizer))


def test_what_every_prompt_or_response_needs_must_be_in_the_vocabulary_and_the_rest_need_not():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    check_chats(tokenizer, {}, len(tokenizer) - 1)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>", "<|new|>")
    with pytest.raises(
        ValueError, match=r"the chat template .*token \d+ \('<\|new\|>'\) is outside"
    ):
        check_chats(tokenizer, {}, len(tokenizer) - 1)
    with pytest.raises(ValueError, match=r"end-of-sequence token .* token 1 .* vocabulary of 1 "):
        check_chats(tokenizer, {}, 1)


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(folder):
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["eos_token"]
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"model\.path: .*no end-of-sequence token"):
        load_tokenizer(str(folder))


def test_checking_the_files_imports_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from megasd.data.tokenizer import check_tokenizer_files as check; "
        "assert check(sys.argv[1]) == []; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
