"""config.json of published models, for plans where no model folder is at hand."""

from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {  # of Qwen3: what the models' config.json say
    "1.7B": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    "4B": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "32B": {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 25600,
        "tie_word_embeddings": False,
    },
    "30B-A3B": {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "tie_word_embeddings": False,
    },
    "235B-A22B": {
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "tie_word_embeddings": False,
    },
}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}


LLAMA = "Llama-3.1-8B"
NAMES = (*SIZES, LLAMA)  # what `--model` takes; a size is of Qwen3


def preset(name: str) -> dict[str, Any]:
    """What the tables and the planner read of the config.json of this model."""
    if name == LLAMA:
        return {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "tie_word_embeddings": False,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
        }
    has_experts = "moe_intermediate_size" in SIZES[name]
    return {
        "model_type": "qwen3_moe" if has_experts else "qwen3",
        **SIZES[name],
        **(EXPERTS if has_experts else {}),
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
    }


def preset_of_path(path: str) -> str | None:
    """The preset that a model folder is named after: models/Qwen3-8B is 8B."""
    name = Path(path).name.removeprefix("Qwen3-")
    return name if name in NAMES else None


def full_name(name: str) -> str:
    """What a folder of this preset is called."""
    return f"Qwen3-{name}" if name in SIZES else name
