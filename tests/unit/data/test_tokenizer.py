import json
import subprocess
import sys
from pathlib import Path

import pytest

from megasd.data.tokenizer import check_tokenizer_files, encode_chat, load_tokenizer
from megasd.testing.tiny import tiny_tokenizer


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
