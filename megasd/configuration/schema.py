"""What the type hints of a config dataclass say about its keys, for errors in plain words."""

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megasd.configuration.written import Written, plain

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def fields_of(owner: Any) -> dict[str, Any]:
    """The type hint of every field."""
    hints = get_type_hints(owner)
    return {f.name: hints[f.name] for f in dataclasses.fields(owner)}


def is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def without_null(hint: Any) -> Any:
    """A hint without its `| None`."""
    return next(a for a in get_args(hint) if a is not type(None)) if is_optional(hint) else hint


def section_of(hint: Any) -> Any:
    """The dataclass behind a hint, None if there is none."""
    return without_null(hint) if dataclasses.is_dataclass(without_null(hint)) else None


def known_keys(owner: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in fields_of(owner).items():
        yield f"{prefix}{name}"
        if section := section_of(hint):
            yield from known_keys(section, f"{prefix}{name}.")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as sections within sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def is_list_of_lists(value: Any, hint: Any) -> bool:
    """True if a list that is to hold plain values holds lists or sections."""
    items = value if get_origin(hint) is list and isinstance(value, list) else ()
    return any(isinstance(item, list | dict) for item in items)


def as_meant(value: Any, hint: Any) -> Any:
    """A value of a file as its key's type reads it: text, and words to choose from, as written."""
    hint = without_null(hint)
    kind, inner = get_origin(hint), get_args(hint)
    if isinstance(value, Written):
        if hint is str or (kind is Literal and value.text in inner):
            return value.text
        return "off" if kind is Literal and value.value is False and "off" in inner else value.value
    if isinstance(value, list) and kind in (list, tuple):
        return [as_meant(item, inner[0]) for item in value]
    if isinstance(value, dict) and kind is dict:
        return {name: as_meant(item, inner[1]) for name, item in value.items()}
    return plain(value)


def shown(value: Any) -> str:
    """A value as a config file would hold it, on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)


def describe(hint: Any) -> str:
    if is_optional(hint):
        return f"{describe(without_null(hint))}, or null"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list of {_WORDS[get_args(hint)[0]]}, like [a, b]"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    if section := section_of(hint):
        return "a section with keys among " + ", ".join(fields_of(section))
    if get_origin(hint) is dict and get_args(hint)[1] in _WORDS:
        return f"a section whose values are {_WORDS[get_args(hint)[1]]}, like {{A: b}}"
    return _WORDS.get(hint, "a section")


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """The nearest known key; one with the same last part counts as near wherever it stands."""
    known = list(known)
    last = key.rpartition(".")[2]
    near = [other for other in known if other.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
