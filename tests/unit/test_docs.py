import re
from pathlib import Path

import megasd
from megasd.algorithms import ALGORITHMS, load_algorithm
from megasd.configuration import schema
from megasd.configuration.load import Config

DOCS = Path(megasd.__file__).parent / "docs"


def documented(page: str) -> set[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([a-zA-Z_]+\.[a-zA-Z0-9_.]+)` \|", text, flags=re.MULTILINE))


def leaves(keys: set[str]) -> set[str]:
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def test_the_configuration_page_lists_every_key_and_no_other() -> None:
    keys = {key for key in schema.known_keys(Config) if not key.startswith("algorithm")}
    outside = {k for k in documented("configuration.md") if not k.startswith("algorithm.")}
    assert outside == leaves(keys) | {"data.reasoning_gym", "model.fp8"}


def test_the_two_pages_list_every_key_of_every_method_and_no_other() -> None:
    keys = {"algorithm.name"}
    for name in ALGORITHMS:
        keys |= set(schema.known_keys(load_algorithm(name).cls, "algorithm."))
    pages = documented("configuration.md") | documented("methods.md")
    assert {k for k in pages if k.startswith("algorithm.")} == leaves(keys)


def test_the_methods_page_names_every_method() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    missing = [name for name in ALGORITHMS if f"**{name}**" not in page and f"`{name}`" not in page]
    assert not missing
