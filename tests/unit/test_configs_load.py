"""Every recipe that is shipped loads."""

from pathlib import Path

import pytest

from megasd.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipe_loads(path: Path) -> None:
    load_config(path, ["run.name=tried", "model.path=model"])
