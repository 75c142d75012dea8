import re
from pathlib import Path

import megasd
from megasd import schema
from megasd.algorithms import ALGORITHMS, load_algorithm
from megasd.config import Config

PAGE = Path(megasd.__file__).parent / "docs" / "configuration.md"


def test_the_configuration_page_lists_every_key_and_no_other() -> None:
    keys = {key for key in schema.known_keys(Config) if not key.startswith("algorithm")}
    for name in ALGORITHMS:
        keys |= set(schema.known_keys(load_algorithm(name)[0], "algorithm."))
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    documented = set(re.findall(r"^\| `([a-z_.]+)` \|", PAGE.read_text(), flags=re.MULTILINE))
    assert documented == leaves | {"algorithm.name", "data.reasoning_gym"}
