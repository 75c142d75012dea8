"""YAML whose scalars keep the characters that a person wrote, until a key says what it holds.

YAML 1.1 reads 12:00:00 as the number 43200, 0123 as 83, 1e3 as 1000.0 and `no` as false. A key that
holds text must not get these instead (schema.as_meant); one that holds a number gets no number that
was not written as one: times and octals stay text, which it refuses or reads in tens.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_STR = f"{_TAG}str"
_DIGITS = r"[0-9](?:_?[0-9])*"
_PATTERNS = {
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "int": r"[-+]?(?:0|[1-9](?:_?[0-9])*|0x[0-9a-fA-F_]+|0b[01_]+)",
    "float": rf"[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+"
    rf"|\.{_DIGITS}(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
    "null": r"~|null|Null|NULL|",
    "merge": r"<<",
}


@dataclass(frozen=True)
class Written:
    """A number or a truth value, and how it was written."""

    text: str
    value: bool | int | float

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """The names of keys are text, whatever they look like, and each is there once."""
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                key.tag = _STR
                if key.value in names:
                    fault = f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
                names.add(key.value)
        super().flatten_mapping(node)

    def construct_written(self, node: yaml.ScalarNode) -> Written:
        kind = node.tag.removeprefix(_TAG)
        return Written(node.value, getattr(self, f"construct_yaml_{kind}")(node))

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        return super().construct_mapping(node, deep=True)  # at once: a circle is an error


_Loader.yaml_implicit_resolvers = {}  # not those of YAML 1.1
for _kind, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern})$"), None)
for _kind in ("bool", "int", "float"):
    _Loader.add_constructor(_TAG + _kind, _Loader.construct_written)


def read_yaml(text: str) -> Any:
    """What a document holds: dicts, lists, text, None, and `Written`; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def plain(node: Any) -> Any:
    """With numbers and truth values as YAML reads them."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return node.value if isinstance(node, Written) else node
