import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megasd.testing.hollow import Size, hollow_qwen3
from megasd.testing.tiny import ALPHABET, tiny_llama, tiny_qwen3, tiny_qwen3_moe, tiny_tokenizer
from megasd.weights.hf_folder import HFFolder

FAMILIES = {"qwen3": tiny_qwen3, "qwen3_moe": tiny_qwen3_moe, "llama": tiny_llama}


def test_every_character_is_one_token_and_decodes_back() -> None:
    tokenizer = tiny_tokenizer(strings=())
    ids = tokenizer(ALPHABET, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(ALPHABET) == len(set(ids))
    assert tokenizer.decode(ids) == ALPHABET
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_whole_strings_are_one_token_and_keep_their_spaces() -> None:
    tokenizer = tiny_tokenizer(strings=(" + ", " [answer: "))
    ids = tokenizer("7 + 5 [answer: 12]", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["7", " + ", "5", " [answer: ", "1", "2", "]"]
    assert tokenizer.decode(ids) == "7 + 5 [answer: 12]"


def test_the_saved_folder_loads_and_writes_a_conversation(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3(tmp_path))
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+1"},
    ]
    question = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert question == "<|system|>Add.<|user|>1+1<|assistant|>"
    messages.append({"role": "assistant", "content": "#2"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == question + "#2<|eos|>"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_weight_and_nothing_is_missing(
    tmp_path: Path, family: str, tie: bool
) -> None:
    folder = FAMILIES[family](tmp_path, tie=tie, vocab=128, norm_spread=0.2, max_shard_size="20KB")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(list(folder.glob("*.safetensors"))) > 1
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.shape == (128, 32)
    assert torch.equal(embedding, head) == tie
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32
        assert ("norm" in name) == (abs(weight.mean().item() - 1.0) < 0.5)
        assert weight.std() > 0.04


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_alone_decides_the_files(tmp_path: Path, family: str) -> None:
    first, again, other = (
        {
            file.name: file.read_bytes()
            for file in FAMILIES[family](tmp_path / name, seed=seed).iterdir()
        }
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


@pytest.mark.parametrize(
    ("size", "parameters"), [("30B-A3B", 30_532_122_624), ("235B-A22B", 235_093_634_560)]
)
def test_a_hollow_model_with_experts_holds_as_many_weights_as_the_true_one(
    tmp_path: Path, size: Size, parameters: int
) -> None:
    folder = hollow_qwen3(tmp_path, size)
    assert sum(map(math.prod, HFFolder(folder).shapes.values())) == parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert model.num_parameters() == parameters
    files = [file.stat() for file in folder.glob("*.safetensors")]
    assert sum(file.st_size for file in files) > 2 * parameters
    assert 512 * sum(file.st_blocks for file in files) < 10**7
