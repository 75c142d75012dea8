"""The tokenizer of a Hugging Face folder, and chat messages as token ids."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any one of them holds a vocabulary that transformers can read.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEMPLATE_FILE = "chat_template.jinja"  # before whatever tokenizer_config.json says


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
        problem = _template_problem(folder)
    except (ValueError, RecursionError) as error:
        errors.append(f"model.path: {path}/tokenizer_config.json is not JSON: {error}.")
    else:
        if problem:
            errors.append(
                f"model.path: the tokenizer in {path} {problem}; add a {TEMPLATE_FILE} to the "
                "folder, or start from a chat model."
            )
    return errors


def _template_problem(folder: Path) -> str | None:
    """Why the files hold no template for chats; None where they do."""
    config, alone = folder / "tokenizer_config.json", folder / TEMPLATE_FILE
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError("it holds no object")
    template = settings.get("chat_template")
    if alone.is_file():
        template = alone.read_text(encoding="utf-8")
    elif (folder / "additional_chat_templates").is_dir() or isinstance(template, list):
        named = template if isinstance(template, list) else []
        template = {one.get("name"): one.get("template") for one in named if isinstance(one, dict)}
        if "default" not in template:
            return "has several chat templates and none that is called default"
        template = template["default"]
    if template is None:
        return "has no chat template"
    if not isinstance(template, str) or not template.strip():
        return "has an empty chat template"
    return None


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


class UnusableTextError(ValueError):
    """Why a text cannot become the token ids of a prompt."""


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
) -> np.ndarray:
    """[P] int64: the messages under the chat template, generation header included.

    `options` is `data.chat_template_options`, what this model's template understands. Raises
    UnusableTextError for messages that the template does not take, whatever it raises.
    """
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_dict=False,
            **options,
        )
        token_ids = np.asarray(ids, dtype=np.int64)
    except TemplateError as error:
        raise UnusableTextError(f"the chat template refuses the messages: {error}") from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a template is a program: it fails in as many ways
        said = f"{type(error).__name__}: {error}"
        raise UnusableTextError(f"the chat template fails on the messages ({said})") from error
    if not len(token_ids):
        raise UnusableTextError("the chat template makes an empty prompt of the messages")
    return token_ids


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> np.ndarray:
    """[T] int64: a text as it stands, without special tokens around it."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


def outside_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", token_ids: np.ndarray, vocab_size: int
) -> str | None:
    """What is wrong with ids that the model has no row for; None where there are none.

    A tokenizer may have more tokens than the model as long as nobody writes them.
    """
    if not len(token_ids) or token_ids.max() < vocab_size:
        return None
    index = int(token_ids.max())
    return (
        f"token {index} ({tokenizer.convert_ids_to_tokens(index)!r}) is outside the model's "
        f"vocabulary of {vocab_size} (vocab_size of config.json)"
    )


def check_chats(
    tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any], vocab_size: int
) -> None:
    """Raises one ValueError about `model.path` for what would be wrong with every prompt."""
    folder = tokenizer.name_or_path
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer has looked"
    if problem := outside_vocabulary(tokenizer, np.array([tokenizer.eos_token_id]), vocab_size):
        raise ValueError(
            f"model.path: the end-of-sequence token of {folder} does not exist: {problem}; use "
            "the tokenizer of the model"
        )
    try:
        token_ids = encode_chat(tokenizer, [{"role": "user", "content": "1"}], options)
    except UnusableTextError as why:
        if "makes an empty prompt" not in str(why):
            return  # it may take the messages of the rows
        raise ValueError(f"model.path: {folder}: {why}; write a chat template") from why
    if problem := outside_vocabulary(tokenizer, token_ids, vocab_size):
        raise ValueError(
            f"model.path: the chat template of {folder} writes a token that does not exist: "
            f"{problem}; use the model's own template, or a model that was resized to the tokenizer"
        )


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
