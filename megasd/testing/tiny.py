"""A tokenizer and models of every family, small enough for a test, as real Hugging Face folders.

Nothing is downloaded: the tokenizer is built here, and the weights are drawn name by name from a
seed, so a folder is the same on every machine and with every transformers version.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"
SPECIAL_TOKENS = (
    "<|pad|>",
    "<|eos|>",
    "<|unk|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
# Whole strings of the quickstart's prompts: they become 8 to 10 tokens instead of 70.
QUICKSTART_STRINGS = (
    "State the final answer to the following arithmetic problem: ",
    " + ",
    " - ",
    " =",
    " [answer: ",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(strings: Sequence[str] = QUICKSTART_STRINGS) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and one for each of `strings`.

    Whatever is outside the alphabet becomes `<|unk|>`. The chat template knows the roles system,
    user and assistant, ends an assistant's message with `<|eos|>`, and its generation header is
    the single token `<|assistant|>`.
    """
    characters = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
    backend = Tokenizer(models.WordLevel(characters, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(strings))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What every family's function takes.

    Matrices are drawn from N(0, init_scale^2), the weights of norms from N(1, norm_spread^2): with
    `norm_spread` 0 a norm that is skipped or swapped would not show, so parity tests set it.
    """

    seed: int = 0
    tokenizer: PreTrainedTokenizerFast | None = None
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None  # None: hidden / heads
    intermediate: int = 64
    tie: bool = True
    vocab: int | None = None  # rows of embedding, at least one per token; None: just those
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    init_scale: float = 0.06
    norm_spread: float = 0.0
    max_shard_size: str = "5GB"  # a small one ("20KB") makes several files and an index


def tiny_qwen3(folder: Path | str, **sizes: Any) -> Path:
    """Writes a random Qwen3 with its tokenizer into `folder`; see `_tiny`."""
    return _tiny(folder, "qwen3", {"head_dim": 16, **sizes})


def tiny_llama(folder: Path | str, *, rope_factor: float = 8.0, **sizes: Any) -> Path:
    """Writes a random Llama 3.1 with its tokenizer into `folder`; see `_tiny`.

    Its RoPE is scaled as Llama 3.1's (`rope_factor` 8) or 3.2's (32).
    """
    scaling = {
        "rope_type": "llama3",
        "factor": rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _tiny(folder, "llama", sizes, rope=scaling)


def tiny_qwen3_moe(
    folder: Path | str,
    *,
    experts: int = 4,
    experts_per_token: int = 2,
    moe_intermediate: int = 24,
    norm_topk_prob: bool = True,
    **sizes: Any,
) -> Path:
    """Writes a random Qwen3-MoE with its tokenizer into `folder`; see `_tiny`."""
    of_experts = {
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": moe_intermediate,
        "norm_topk_prob": norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    sizes = {"head_dim": 16, "tie": False, **sizes}
    return _tiny(folder, "qwen3_moe", sizes, more=of_experts)


def _tiny(
    folder: Path | str,
    model_type: str,
    sizes: Mapping[str, Any],
    *,
    more: Mapping[str, Any] | None = None,
    rope: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config, float32 weights and tokenizer; returns `folder`. `sizes` are of `_Sizes`."""
    folder, of = Path(folder), _Sizes(**sizes)
    tokenizer = tiny_tokenizer() if of.tokenizer is None else of.tokenizer
    vocabulary = tokenizer.get_vocab()
    config: Any = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer) if of.vocab is None else of.vocab,
        hidden_size=of.hidden,
        num_hidden_layers=of.layers,
        num_attention_heads=of.heads,
        num_key_value_heads=of.kv_heads,
        head_dim=of.head_dim or of.hidden // of.heads,
        intermediate_size=of.intermediate,
        max_position_embeddings=of.max_position_embeddings,
        rope_parameters={**(rope or {"rope_type": "default"}), "rope_theta": of.rope_theta},
        tie_word_embeddings=of.tie,
        bos_token_id=None,
        eos_token_id=vocabulary[str(tokenizer.eos_token)],
        pad_token_id=vocabulary[str(tokenizer.pad_token)],
        dtype="float32",
        **(more or {}),
    )
    assert config.vocab_size >= len(tokenizer), "the embedding must hold every token"
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(of.seed)
    with torch.no_grad():
        # By name, not in module order: the draw must not depend on how transformers builds it.
        for name, weight in sorted(model.named_parameters()):
            mean, scale = (1.0, of.norm_spread) if "norm" in name else (0.0, of.init_scale)
            weight.copy_(mean + scale * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=of.max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder
