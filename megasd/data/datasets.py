"""From rows to prompts: every row is checked and tokenised before anything long starts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from megasd.data.config import DataConfig
from megasd.data.sources import BadRowError, Row, file_rows, reasoning_gym_rows, text_problem
from megasd.data.tokenizer import (
    UnusableTextError,
    check_chats,
    encode_chat,
    encode_text,
    outside_vocabulary,
)
from megasd.rewards.verifiers import check_row, check_verifiers
from megasd.types import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
LISTED_BAD_ROWS = 20


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The usable rows in their order, and why others were left out."""

    prompts: list[Prompt]
    skipped: list[str]  # "train.jsonl:12: why", with data.on_bad_row: skip


def load_prompts(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    files: Sequence[str] | None = None,
    key: str = "data.files",
    require_solution: bool = False,
    vocab_size: int | None = None,
) -> LoadedPrompts:
    """Reads `data.files` or `data.reasoning_gym`; with `files`, those instead.

    key: how errors name the files, for callers that pass their own.
    require_solution: a row without `solution` is a bad row.
    vocab_size: rows of the model's embedding; a text with a token beyond them is a bad row.

    Raises a ValueError that lists the bad rows (the first 20, and how many there are) unless
    `data.on_bad_row` is skip; and one where no row is left.
    """
    source, rows = _rows(data, files, key)
    if vocab_size is not None:
        check_chats(tokenizer, data.chat_template_options, vocab_size)
        if max(tokenizer.get_vocab().values()) < vocab_size:
            vocab_size = None  # no text has a token beyond it
    prompts: list[Prompt] = []
    bad: list[str] = []
    for index, (where, row) in enumerate(rows):
        try:
            if isinstance(row, BadRowError):
                raise row
            if require_solution and "solution" not in row:
                raise BadRowError("no `solution`, and the run needs one for every row")
            prompt = _prompt(row, index, where, data, tokenizer)
            if vocab_size is not None:
                _check_vocabulary(prompt, tokenizer, vocab_size)
            prompts.append(prompt)
        except BadRowError as why:
            bad.append(f"{where}: {why}")
    if bad and (data.on_bad_row == "stop" or not prompts):
        raise ValueError(f"{source}: {_report(bad, len(prompts))}")
    if not prompts:
        raise ValueError(f"{source}: there are no rows to read.")
    return LoadedPrompts(prompts, bad)


def _rows(data: DataConfig, files: Sequence[str] | None, key: str) -> tuple[str, Iterable[Row]]:
    """What errors call the source, and its rows."""
    if files is not None:
        return f"{key} ({', '.join(files)})", file_rows(files, key)
    if data.files and data.reasoning_gym is not None:
        raise ValueError("data.files and data.reasoning_gym are both set: choose one source.")
    if data.reasoning_gym is not None:
        return "data.reasoning_gym", reasoning_gym_rows(data.reasoning_gym)
    if not data.files:
        raise ValueError(
            "data.files is empty: name .jsonl or .parquet files there, or a task in "
            "data.reasoning_gym."
        )
    return _rows(data, data.files, "data.files")


def _report(bad: list[str], usable: int) -> str:
    remedy = "correct them"
    if usable:
        remedy += ", or set data.on_bad_row: skip to leave them out"
    more = [f"... and {len(bad) - LISTED_BAD_ROWS} more"] if len(bad) > LISTED_BAD_ROWS else []
    lines = [*bad[:LISTED_BAD_ROWS], *more]
    return f"{len(bad)} of {len(bad) + usable} rows are bad: {remedy}.\n  " + "\n  ".join(lines)


def _prompt(
    row: Mapping[str, Any],
    index: int,
    where: str,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> Prompt:
    """One row as a prompt. Raises BadRowError."""
    for name, value in row.items():
        if problem := text_problem(value):
            raise BadRowError(f"`{name}` {problem}")
    for name in ("answer", "solution", "verifier"):
        if not isinstance(row.get(name, ""), str):
            raise BadRowError(f"`{name}` must be a string, not {type(row[name]).__name__}")
    metadata = row.get("metadata", {})
    if not isinstance(metadata, Mapping):
        raise BadRowError(f"`metadata` must be an object, not {type(metadata).__name__}")
    verifier = row.get("verifier", data.verifier)
    if problem := _verifier_problem(verifier):
        raise BadRowError(problem)
    if problem := check_row(verifier, row.get("answer"), metadata):
        raise BadRowError(problem)
    messages = _messages(row)
    if data.system_prompt is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": data.system_prompt}, *messages)
    try:
        token_ids = encode_chat(tokenizer, messages, data.chat_template_options)
    except UnusableTextError as why:
        raise BadRowError(str(why)) from why
    if len(token_ids) > data.max_prompt_tokens:
        raise BadRowError(
            f"the prompt has {len(token_ids)} tokens, more than data.max_prompt_tokens "
            f"{data.max_prompt_tokens}"
        )
    return Prompt(
        index=index,
        messages=tuple(messages),
        token_ids=token_ids,
        answer=row.get("answer"),
        solution=row.get("solution"),
        verifier=verifier,
        metadata=metadata,
        where=where,
    )


def _check_vocabulary(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> None:
    """Every text of a row that student or teacher may read. Raises BadRowError."""
    texts = {"answer": prompt.answer, "solution": prompt.solution}
    encoded = {name: encode_text(tokenizer, text) for name, text in texts.items() if text}
    for name, token_ids in {"prompt": prompt.token_ids, **encoded}.items():
        if problem := outside_vocabulary(tokenizer, token_ids, vocab_size):
            raise BadRowError(f"`{name}`: {problem}")


@cache
def _verifier_problem(name: str) -> str | None:
    return next(iter(check_verifiers([name])), None)


def _messages(row: Mapping[str, Any]) -> Messages:
    if "prompt" in row and "messages" in row:
        raise BadRowError("has both `prompt` and `messages`")
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            raise BadRowError(f"`prompt` must be a string, not {type(prompt).__name__}")
        messages = [{"role": "user", "content": prompt}]
    elif "messages" in row:
        messages = row["messages"]
    else:
        raise BadRowError("has neither `prompt` nor `messages`")
    if not isinstance(messages, list) or not messages:
        raise BadRowError("`messages` must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        _check_message(message, number)
    if messages[-1]["role"] != "user":
        raise BadRowError(f"the last message is from the {messages[-1]['role']}, not from the user")
    if not messages[-1]["content"].strip():
        raise BadRowError("the prompt is empty")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, Mapping):
        raise BadRowError(f"message {number} must be an object with `role` and `content`")
    if message.get("role") not in ROLES:
        raise BadRowError(f"message {number}: `role` must be one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise BadRowError(f"message {number}: `content` must be a string")
