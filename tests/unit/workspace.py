"""A folder with a valid config, its data, and a model folder: what the config tests mutate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from megasd.configuration.load import read_config
from megasd.configuration.validate import validate
from megasd.weights.tables import table_for

QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 35,
}

CONFIG = """
run: {name: tried, steps: 10, directory: runs}
model: {path: model}
data: {files: [train.jsonl], max_prompt_tokens: 100}
context: {max_tokens: 50}
algorithm: {name: rlsd}
rollout: {prompts_per_step: 8, group_size: 4, max_response_tokens: 100}
evaluation: {files: [held_out.jsonl]}
"""


def make_workspace(folder: Path) -> Path:
    """Fills `folder`, which is to be the working directory: config.yaml is valid there."""
    (folder / "config.yaml").write_text(CONFIG)
    for name in ("train.jsonl", "held_out.jsonl"):
        (folder / name).write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    make_model(folder / "model")
    return folder


def make_model(folder: Path, **changes: Any) -> None:
    """A Hugging Face folder with weights of zeros and a tokenizer that is only there."""
    folder.mkdir(exist_ok=True)
    hf_config = {**QWEN3, **changes}
    (folder / "config.json").write_text(json.dumps(hf_config))
    shapes = table_for(hf_config).hf_shapes()
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def edit_json(name: str, **changes: Any) -> None:
    path = Path(name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def faults(*overrides: str, world_size: int = 1, new_run: bool = True) -> list[str]:
    """Everything that is wrong with config.yaml under these overrides."""
    loaded = read_config("config.yaml", overrides)
    return loaded.errors + validate(loaded, world_size=world_size, new_run=new_run)
