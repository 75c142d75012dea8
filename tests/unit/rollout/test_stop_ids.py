"""Where a response ends: at the tokens at which transformers and vLLM end it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from megasd.data.tokenizer import load_tokenizer
from megasd.rollout.engine import stop_ids
from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_tokenizer

EOS: Any = tiny_tokenizer().eos_token_id
UNSET = object()


def set_eos(file: Path, value: Any) -> None:
    said = json.loads(file.read_text()) if file.exists() else {}
    said.pop("eos_token_id", None)
    file.write_text(json.dumps(said if value is UNSET else said | {"eos_token_id": value}))


@pytest.mark.parametrize("family", [tiny_qwen3, tiny_llama])
def test_the_tokens_are_those_of_transformers_and_the_tokenizers_own(
    tmp_path: Path, family: Any
) -> None:
    folder = family(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    config, generation = folder / "config.json", folder / "generation_config.json"
    for in_config in (UNSET, None, 6, [1, 6, 7]):
        set_eos(config, in_config)
        for in_generation in (None, UNSET, 9, [8, 9]):
            set_eos(generation, in_generation)
            if in_generation is None:
                generation.unlink()
                if in_config is UNSET and family is tiny_llama:  # there is no one answer to it
                    with pytest.raises(ValueError, match=r"names no eos_token_id, .* default, 2"):
                        stop_ids(folder, tokenizer)
                    continue
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
            theirs = model.generation_config.eos_token_id
            theirs = {*theirs} if isinstance(theirs, list) else {theirs} - {None}
            assert stop_ids(folder, tokenizer) == sorted(theirs | {EOS})


def test_they_are_those_of_vllm(tmp_path: Path) -> None:
    config = pytest.importorskip("vllm.transformers_utils.config")
    folder = tiny_qwen3(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    set_eos(folder / "config.json", [1, 6, 7])
    for ids in ([8, 9], UNSET, None):
        set_eos(folder / "generation_config.json", ids)
        if ids is None:
            (folder / "generation_config.json").unlink()
        found = config.try_get_generation_config(str(folder), trust_remote_code=False)
        theirs = found.to_diff_dict().get("eos_token_id", [])
        assert stop_ids(folder, tokenizer) == sorted({*theirs, EOS})


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, -2]}', "[]"])
def test_what_is_no_token_id_is_one_sentence(tmp_path: Path, text: str) -> None:
    folder = tiny_qwen3(tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^model.path: .*; correct it"):
        stop_ids(folder, load_tokenizer(str(folder)))
