"""Rows with their provenance: where they were read, before anything is asked of them.

JSONL and Parquet are read by `json` and `pyarrow` themselves: a dataset builder on top infers one
schema for all rows and caches it, and loses the line number that an error must name.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megasd.data.config import ReasoningGymConfig
from megasd.process.errors import TryAgainError, may_pass

_HALF = re.compile("[\ud800-\udfff]")
DEEPEST = 100  # lists and objects within each other; more ends in a RecursionError somewhere
FIELDS = ("prompt", "messages", "answer", "solution", "verifier", "metadata")


class BadRowError(ValueError):
    """Why one row cannot be used."""


Row = tuple[str, Mapping[str, Any] | BadRowError]
"""("train.jsonl:12" or "train.parquet row 12", its fields or why there are none).

Lines and rows count from 1. Fields that are null are left out.
"""


def check_files(files: Sequence[str], key: str = "data.files") -> list[str]:
    """What is wrong with the named files before one is opened, a sentence each."""
    errors = []
    for name in files:
        if Path(name).suffix not in READERS:
            errors.append(f"{key}: {name} is neither .jsonl nor .parquet.")
        elif not Path(name).is_file():
            errors.append(f"{key}: {name} does not exist; paths start at the working directory.")
    return errors


def file_rows(files: Sequence[str], key: str = "data.files") -> Iterator[Row]:
    """Rows of the files in order. Raises ValueError, or TryAgainError, where one cannot be read."""
    if errors := check_files(files, key):
        raise ValueError("\n".join(errors))
    for name in files:
        try:
            yield from READERS[Path(name).suffix](name)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            kind = TryAgainError if isinstance(error, OSError) and may_pass(error) else ValueError
            raise kind(f"{key}: {name} cannot be read: {error}") from error


def _jsonl_rows(name: str) -> Iterator[Row]:
    with open(name, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield f"{name}:{number}", _parse_line(line)


def _parse_line(line: bytes) -> Mapping[str, Any] | BadRowError:
    try:
        row = json.loads(line)
    except RecursionError:
        return BadRowError(f"not JSON that can be read: nested more than {DEEPEST} deep")
    except ValueError as error:  # broken JSON, or bytes that are no text
        return BadRowError(f"not JSON: {error}")
    if not isinstance(row, dict):
        return BadRowError(f"a row is a JSON object, not {type(row).__name__}")
    return _known_fields(row)


def _parquet_rows(name: str) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(name) as file:
        columns = [column for column in FIELDS if column in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{name} row {number}", _known_fields(row)


READERS = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _known_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in FIELDS if row.get(name) is not None}


def encodable(text: str) -> str:
    """`text` with a question mark for every half of a character."""
    return text.encode("utf-8", "replace").decode()


def text_problem(value: Any) -> str | None:
    """Why texts anywhere in `value` cannot be handed on; None where they can.

    JSON and YAML can spell half of a character outside the 16-bit plane: a str that no tokenizer,
    file or pipe takes. Keys count too.
    """
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                if found := _HALF.search(one):
                    return (
                        f"holds half of a character ({found[0]!r}, a lone surrogate), which cannot "
                        "be encoded"
                    )
            elif isinstance(one, Mapping):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, Sequence) and not isinstance(one, bytes):
                below += one
        if not below:
            return None
        level = below
    return f"is nested more than {DEEPEST} deep"


def reasoning_gym_rows(config: ReasoningGymConfig) -> Iterator[Row]:
    """Items of a reasoning-gym task; their metadata is what its own scorer needs.

    Raises a ValueError that names the key for an unknown task or options that it refuses.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    key = "data.reasoning_gym"
    if config.task not in DATASETS:
        close = difflib.get_close_matches(config.task, DATASETS, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{key}.task: reasoning-gym has no task {config.task!r}.{hint}")
    options = dict(config.options)
    if clash := sorted({"seed", "size"} & set(options)):
        raise ValueError(f"{key}.options: set {key}.{clash[0]} instead of {clash[0]!r} here.")
    try:
        dataset = reasoning_gym.create_dataset(
            config.task, seed=config.seed, size=config.size, **options
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{key}.options: {config.task} refuses them: {error}") from error
    for number in range(config.size):
        item = dataset[number]
        row = {
            "prompt": item["question"],
            "answer": item["answer"],
            "verifier": "reasoning_gym",
            "metadata": {"task": config.task, "options": options, "entry": item},
        }
        yield f"reasoning_gym {config.task} item {number}", _known_fields(row)
