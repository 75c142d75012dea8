"""The papers' recipes and the tiny configs: all run as they stand, and say where numbers come from.

The working directory has what the files name: hollow models of the true sizes, and the
quickstart's tiny one.
"""

import math
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megasd.algorithms import ALGORITHMS
from megasd.cli import main
from megasd.configuration.load import Config, differing_keys, load_config, read_config
from megasd.configuration.validate import validate
from megasd.rewards import sandbox
from megasd.testing.hollow import SIZES, Size, hollow_qwen3
from megasd.testing.tiny import tiny_qwen3
from megasd.weights.hf_folder import HFFolder

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted((CONFIGS / "recipes").glob("*.yaml"))
RECIPES = [path for path in FILES if not path.stem.startswith("base")]
TINY = sorted((CONFIGS / "tiny").glob("*.yaml"))
METHODS = [name for name in ALGORITHMS if name != "sft"]
QUICKSTART_INPUTS = Path("runs/quickstart-inputs")


def recipe(name: str) -> Config:
    return load_config(CONFIGS / "recipes" / f"{name}.yaml")


def size_of(path: str) -> Size:
    return next(size for size in SIZES if f"-{size}" in path)  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def _workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("workspace")
    for path in {load_config(path).model.path for path in RECIPES}:
        hollow_qwen3(folder / path, size_of(path))
    tiny_qwen3(folder / QUICKSTART_INPUTS / "model")
    inputs = [QUICKSTART_INPUTS / name for name in ("rl.jsonl", "heldout.jsonl")]
    for file in (Path("data/train.jsonl"), *inputs):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


# ---- the papers' recipes -------------------------------------------------------------------


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_the_dry_run_on_eight_gpus(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "check", lambda: None)  # of the machine, not of the recipe
    code = main(["train", str(path), "--dry-run", "--world-size", "8"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "ranks:       8 = " in out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_of_a_recipe_says_where_it_comes_from(path: Path) -> None:
    for line in path.read_text().splitlines():
        value, _, comment = line.partition("#")
        if re.search(r"[:\[,{] *-?[.\d]", value):
            assert re.search(r"\b(megasd|code|paper|section \d|Tables? \d)", comment), line


def test_every_recipe_runs_under_a_name_of_its_own() -> None:
    assert len({load_config(path).run.name for path in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize(
    ("name", "prompts", "group_size", "prompts_per_update"),
    [
        ("rlsd_8b", 256, 8, 256),
        ("rlrt_8b", 256, 8, 128),
        ("dasd_1_7b", 128, 8, 32),
        ("sdpo_science", 32, 8, 32),
        ("sdpo_code", 32, 8, 1),
        ("distil_math", 32, 1, 32),
        ("opsd_4b", 32, 1, 32),
        ("grpo_on_policy", 32, 8, 32),
        ("grpo_off_policy", 32, 8, 8),
    ],
)
def test_a_papers_batch_and_mini_batch_come_out(
    name: str, prompts: int, group_size: int, prompts_per_update: int
) -> None:
    config = recipe(name)
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.group_size) == (prompts, group_size)
    assert prompts == prompts_per_update * config.optimizer.minibatches_per_step


def test_rlrt_trusts_its_teacher_less_the_more_a_model_was_trained() -> None:
    algorithms = [recipe(f"rlrt_{name}").algorithm for name in ("4b", "4b_instruct", "4b_thinking")]
    assert [a.max_deviation for a in algorithms] == [1.0, 0.5, 0.2]
    assert [a.mix_at(30) for a in algorithms] == [0.5, 0.0, 0.0]
    assert [a.mix_at(15) for a in algorithms] == [0.5, 0.25, 0.25]


def test_on_and_off_policy_grpo_differ_in_their_updates_alone() -> None:
    assert differing_keys(recipe("grpo_on_policy"), recipe("grpo_off_policy")) == [
        "optimizer.minibatches_per_step",
        "optimizer.warmup_steps",
        "run.name",
    ]


# ---- tiny configs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_tiny_config(name: str) -> None:
    assert load_config(CONFIGS / "tiny" / f"{name}.yaml").algorithm_name == name


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_config_can_run_on_the_quickstarts_inputs(path: Path) -> None:
    loaded = read_config(path)
    assert loaded.errors + validate(loaded, world_size=1, new_run=True) == []


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_config_lets_the_teacher_read_what_its_method_wants(path: Path) -> None:
    config = load_config(path)  # what the quickstart's file says wins over the method's defaults
    just_the_method = ["run.name=tried", f"algorithm.name={config.algorithm_name}"]
    wanted = load_config(CONFIGS / "recipes" / "base.yaml", just_the_method)
    for key in ("context.sources", "teacher.weights", "rollout.group_size"):
        assert attrgetter(key)(config) == attrgetter(key)(wanted)


# ---- hollow models -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("1.7B", 1_720_574_976), ("4B", 4_022_468_096), ("8B", 8_190_735_360)],
)
def test_a_hollow_model_has_the_tensors_of_the_true_one_and_takes_no_room(
    tmp_path: Path, size: Size, parameters: int
) -> None:
    folder = hollow_qwen3(tmp_path, size)
    shapes = HFFolder(folder).shapes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert shapes == {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert sum(map(math.prod, shapes.values())) == parameters
    weights = (folder / "model.safetensors").stat()
    assert weights.st_size > 2 * parameters
    assert 512 * weights.st_blocks < 10**6
