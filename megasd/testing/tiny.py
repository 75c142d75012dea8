"""A tokenizer and Qwen3 models small enough for a test, written as real Hugging Face folders.

Nothing is downloaded: the tokenizer is built here, and the weights are drawn name by name from a
seed, so a folder is the same on every machine and with every transformers version.
"""

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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


def tiny_qwen3(
    folder: Path | str,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 64,
    tie: bool = True,
    vocab: int | None = None,
    max_position_embeddings: int = 512,
    rope_theta: float = 10_000.0,
    init_scale: float = 0.06,
    norm_spread: float = 0.0,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a random Qwen3 with its tokenizer into `folder`, weights in float32; returns `folder`.

    Matrices are drawn from N(0, init_scale^2), the weights of norms from N(1, norm_spread^2): with
    `norm_spread` 0 a norm that is skipped or swapped would not show, so parity tests set it.
    `vocab` rows of embedding, at least one per token of the tokenizer (None: just those);
    a small `max_shard_size` ("20KB") cuts the weights into several files and an index.
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    vocabulary = tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(tokenizer) if vocab is None else vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=vocabulary[str(tokenizer.eos_token)],
        pad_token_id=vocabulary[str(tokenizer.pad_token)],
        dtype="float32",
    )
    assert config.vocab_size >= len(tokenizer), "the embedding must hold every token"
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # By name, not in module order: the draw must not depend on how transformers builds it.
        for name, weight in sorted(model.named_parameters()):
            mean, scale = (1.0, norm_spread) if "norm" in name else (0.0, init_scale)
            weight.copy_(mean + scale * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder
