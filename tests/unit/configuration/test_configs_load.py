"""Every config that is shipped loads."""

from pathlib import Path

import pytest

from megasd.configuration.load import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
BASES = set(CONFIGS.rglob("base*.yaml"))  # they name no method: recipes extend them
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - BASES)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_config_loads(path: Path) -> None:
    load_config(path, ["run.name=tried", "model.path=model"])
