"""The tokenizer of a Hugging Face folder, and chat messages as token ids."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any one of them holds a vocabulary that transformers can read.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def check_tokenizer_files(path: str) -> list[str]:
    """What is missing from a model folder before a chat can be tokenised, a sentence each.

    Looks at files only: neither torch nor transformers is imported.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [f"model.path: {path} is not a folder; name a local Hugging Face model folder."]
    errors = []
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        errors.append(
            f"model.path: {path} holds no tokenizer ({', '.join(VOCABULARY_FILES)}); "
            "copy the tokenizer's files beside the weights."
        )
    try:
        has_template = _has_chat_template(folder)
    except ValueError as error:
        errors.append(f"model.path: {path}/tokenizer_config.json is not JSON: {error}.")
    else:
        if not has_template:
            errors.append(
                f"model.path: the tokenizer in {path} has no chat template; add a "
                "chat_template.jinja to the folder, or start from a chat model."
            )
    return errors


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    return "chat_template" in settings or any((folder / f).is_file() for f in TEMPLATE_FILES)


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder, with a chat template and an end-of-sequence token.

    Raises a ValueError that names `model.path` where files, template or token are missing.
    """
    if errors := check_tokenizer_files(path):
        raise ValueError("\n".join(errors))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception on a broken file
        raise ValueError(f"model.path: the tokenizer in {path} cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path: the tokenizer in {path} has no end-of-sequence token, so no response "
            "would ever end; set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
) -> np.ndarray:
    """[P] int64: the messages under the chat template, generation header included.

    `options` is `data.chat_template_options`, what this model's template understands.
    """
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        return_dict=False,
        **options,
    )
    return np.asarray(ids, dtype=np.int64)


def vocabulary_difference(path: str, other: str) -> str | None:
    """The first token id at which the vocabularies of two folders differ; None where none does.

    A teacher's log-probs are about the student's ids: each id must be the same token.
    """
    ours, theirs = (
        {index: token for token, index in load_tokenizer(folder).get_vocab().items()}
        for folder in (path, other)
    )
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            return (
                f"token {index} is {ours.get(index)!r} in one, {theirs.get(index)!r} in the other"
            )
    return None
