"""Loading: what wins over what, and one sentence with file, key and remedy for every fault."""

import subprocess
import sys
from pathlib import Path

import pytest

from megasd.configuration.load import (
    ConfigError,
    RunConfig,
    differing_keys,
    load_config,
    to_yaml,
)
from megasd.policy.config import FP8Config
from tests.unit.workspace import write

COMPLETE = "run: {name: x}\nmodel: {path: m}\nalgorithm: {name: rlsd}\n"


@pytest.fixture(autouse=True)
def _inside_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def errors_of(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.errors


def test_the_later_layer_wins() -> None:
    """Schema < the algorithm's sections < its preset < base < file < command line."""
    write("base.yaml", "rollout: {group_size: 3, top_k: 4}\noptimizer: {lr: 1e-3, eps: 1e-3}\n")
    write("c.yaml", "extends: base.yaml\n" + COMPLETE + "optimizer: {lr: 1e-4, eps: 1e-4}\n")
    config = load_config("c.yaml", ["optimizer.lr=1e-5", "algorithm.clip.high=0.3"])

    assert config.rollout.batch_size == 256  # the schema
    assert config.teacher.weights == "snapshot"  # rlsd; the schema says live
    assert (config.rollout.group_size, config.rollout.top_k) == (3, 4)
    assert (config.optimizer.eps, config.optimizer.lr) == (1e-4, 1e-5)
    assert config.algorithm_name == "rlsd"
    assert (config.algorithm.clip.low, config.algorithm.clip.high) == (0.2, 0.3)
    assert load_config("c.yaml", ["teacher.weights=ema"]).teacher.weights == "ema"


def test_a_preset_is_a_method_with_other_values_which_the_file_may_change() -> None:
    write("c.yaml", COMPLETE)
    dapo = load_config("c.yaml", ["algorithm.name=dapo", "algorithm.overlong_buffer=0.5"])
    assert type(dapo.algorithm).__name__ == "GRPO"
    assert dapo.algorithm_name == "dapo"
    assert (dapo.algorithm.reduction, dapo.algorithm.overlong_buffer) == ("token_mean", 0.5)


def test_a_section_that_may_be_null_is_there_as_soon_as_it_is_named() -> None:
    write("c.yaml", COMPLETE)
    assert load_config("c.yaml").model.fp8 is None
    assert load_config("c.yaml", ["model.fp8.recipe=tensorwise"]).model.fp8 == FP8Config(
        recipe="tensorwise"
    )
    write("d.yaml", COMPLETE.replace("{path: m}", "{path: m, fp8: {}}"))
    config = load_config("d.yaml")
    assert config.model.fp8 == FP8Config()
    write("e.yaml", to_yaml(config))
    assert load_config("e.yaml") == config
    assert load_config("e.yaml", ["model.fp8=null"]).model.fp8 is None
    (error,) = errors_of("d.yaml", "model.fp8.recipe=mxfp8")
    assert "model.fp8.recipe" in error
    assert "one of blockwise, tensorwise, delayed" in error


def test_extends_is_relative_to_the_file_that_says_it_and_may_be_a_chain() -> None:
    Path("deep").mkdir()
    write("root.yaml", "run: {steps: 7, seed: 7}\n")
    write("deep/middle.yaml", "extends: ../root.yaml\nrun: {seed: 8}\n")
    write("c.yaml", "extends: deep/middle.yaml\n" + COMPLETE)
    assert load_config("c.yaml").run == RunConfig(name="x", steps=7, seed=8)


def test_the_saved_configuration_reads_back_equal() -> None:
    write("c.yaml", COMPLETE)
    write("text.yaml", 'extends: c.yaml\ncontext: {template: "1e-6 \\\\${context} $\\\\${x}: #"}\n')
    config = load_config(
        "text.yaml",
        [
            "rollout.mismatch.level=off",
            "run.name='1e-6'",
            "optimizer.betas=[0.8, 0.95]",
            "data.reasoning_gym={task: chain_sum, options: {min_terms: 2, deep: {on: null}}}",
            "data.system_prompt='null'",
            "algorithm.name=dr_grpo",
            "algorithm.clip.dual=3",
        ],
    )
    assert config.context.template == "1e-6 ${context} $${x}: #"
    assert config.run.name == "1e-6"
    write("saved.yaml", to_yaml(config))
    assert load_config("saved.yaml") == config
    assert differing_keys(config, load_config("saved.yaml", ["run.steps=3"])) == ["run.steps"]


def test_a_bare_off_is_the_word_where_that_is_a_choice() -> None:
    write("c.yaml", COMPLETE + "rollout: {mismatch: {level: off}}\nmetrics: {console: off}\n")
    config = load_config("c.yaml", ["metrics.wandb=off"])
    assert (config.rollout.mismatch.level, config.metrics.wandb) == ("off", "off")
    assert config.metrics.console is False


# As a person may write them, and what YAML 1.1 takes them for.
SCALARS = [
    *("12:30", "12:00:00", "0123", "010", "1e3", "1E-2", "1.50", "1_000", "0x1F", ".5", "-3", "+1"),
    *("yes", "no", "On", "off", "TRUE", "y", "2026-01-01", "2026-01-01 10:00:00", ".inf", ".nan"),
    *("=", "0o17", "1.", "007.5", "1:30.5"),
]


def test_text_is_what_was_written_wherever_a_key_holds_text() -> None:
    write("c.yaml", "run: {name: 1e3}\nmodel: {path: 0123}\nalgorithm: {name: rlsd}\n")
    with Path("c.yaml").open("a") as file:
        file.write(f"data:\n  files: [{', '.join(SCALARS)}]\n  system_prompt: 12:30\n")
        keys = ", ".join(f"{scalar}: x" for scalar in SCALARS)
        file.write(f"  chat_template_options: {{{keys}}}\n")
    config = load_config("c.yaml", ["metrics.wandb_project=no", "context.template=2026-01-01"])
    assert (config.run.name, config.model.path, config.data.system_prompt) == (
        "1e3",
        "0123",
        "12:30",
    )
    assert config.data.files == SCALARS
    assert config.data.chat_template_options == dict.fromkeys(SCALARS, "x")
    assert (config.metrics.wandb_project, config.context.template) == ("no", "2026-01-01")
    write("saved.yaml", to_yaml(config))
    assert load_config("saved.yaml") == config


def test_a_number_is_one_that_was_written_as_a_number() -> None:
    write("c.yaml", COMPLETE + "rollout: {vllm: {options: {a: 1e3, b: 0x10, c: no, d: 12:30}}}\n")
    config = load_config("c.yaml", ["run.steps=0100", "run.seed=1_000", "optimizer.lr=.5"])
    assert config.rollout.vllm.options == {"a": 1000.0, "b": 16, "c": False, "d": "12:30"}
    assert (config.run.steps, config.run.seed, config.optimizer.lr) == (100, 1000, 0.5)
    for override in ("run.steps=1:40", "optimizer.lr=1:30.5", "run.steps=1e3", "run.steps=0o17"):
        (error,) = errors_of("c.yaml", override)
        assert "write a " in error
    (error,) = errors_of("c.yaml", "run.name=null")
    assert error == "command line: run.name: got null; write text"


@pytest.mark.parametrize("data", ["&a {files: *a}", "{files: &a [*a]}"])
def test_an_alias_within_its_own_anchor_is_refused(data: str) -> None:
    write("c.yaml", COMPLETE + f"data: {data}\n")
    (error,) = errors_of("c.yaml")
    assert error.startswith("c.yaml, line 4: not valid YAML: found unconstructable recursive node")


def test_a_section_left_empty_says_nothing_and_a_reference_is_followed() -> None:
    write("c.yaml", COMPLETE + "optimizer:\nteacher: {every: '${run.steps}'}\n")
    config = load_config("c.yaml")
    assert (config.optimizer.lr, config.teacher.every) == (1e-6, 100)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("optimizer: {lrr: 1}", ["optimizer.lrr: unknown key", "did you mean optimizer.lr?"]),
        ("lr: 1", ["lr: unknown key", "did you mean optimizer.lr?"]),
        ("run: {zzzzzz: 1}", ["run.zzzzzz: unknown key", "known here: name, directory, steps"]),
        ("algorithm: {name: rlsd, mixx: 1}", ["algorithm.mixx: ", "did you mean algorithm.mix?"]),
        ("run: {steps: many}", ['run.steps: got "many"', "write a whole number"]),
        ("run: {steps: 1.5}", ["run.steps: got 1.5", "write a whole number"]),
        ("run: {steps: null}", ["run.steps: got null", "write a whole number"]),
        ("optimizer: {lr: true}", ["optimizer.lr: got true", "write a number"]),
        ("checkpoint: {export_hf: 7.5}", ["checkpoint.export_hf: got 7.5", "true or false"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas: got [0.9]", "a list of 2 numbers"]),
        ("data: {files: a.jsonl}", ['data.files: got "a.jsonl"', "a list of text, like [a, b]"]),
        ("data: {files: [[a]]}", ['data.files: got [["a"]]', "a list of text"]),
        ("data: {reasoning_gym: 3}", ["data.reasoning_gym: got 3", "task, size", "or null"]),
        ("data: {reasoning_gym: {size: 3}}", ["data.reasoning_gym.task: missing; set it"]),
        ("model: 3", ["model: got 3", "write a section with keys among path, dtype"]),
        ("model: {path: m, dtype: fp8}", ['model.dtype: got "fp8"', "one of bfloat16, float32"]),
        ("algorithm: {name: rlds}", ["algorithm.name: ", "did you mean rlsd?", "antisd, cepo"]),
        ("algorithm: rlsd", ["algorithm.name: missing; choose one of antisd, cepo"]),
        ("algorithm: {name: rlsd, mix: 2}", ["algorithm.mix must be between 0 and 1, not 2"]),
        ("teacher: {every: '${run.stepz}'}", ["teacher.every: the reference", r"write \${"]),
        ("context: {template: '${'}", [r"for a literal ${ write \${"]),
        ("run: [1", ["c.yaml, line 5: not valid YAML", "correct the syntax"]),
        ("run: {seed: 1}\nrun: {seed: 2}", ["c.yaml, line 5: not valid YAML: found duplicate key"]),
        ("extends: [a.yaml]", ["extends: got ['a.yaml']; write the name of one config file"]),
        ("extends: away.yaml", ["c.yaml: extends: there is no config file away.yaml; check"]),
        ("extends: c.yaml", ["extends: a circle, c.yaml -> c.yaml; remove one"]),
    ],
)
def test_a_fault_is_one_sentence_with_file_key_and_remedy(text: str, fragments: list[str]) -> None:
    section = text.split(":")[0]
    kept = "".join(f"{line}\n" for line in COMPLETE.splitlines() if not line.startswith(section))
    write("c.yaml", "# to be tried\n" + kept + text + "\n")
    (error,) = errors_of("c.yaml", *([] if section != "run" else ["run.name=x"]))
    assert error.startswith("c.yaml")
    for fragment in fragments:
        assert fragment in error


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("run.steps", "command line: run.steps: not an override; write key=value"),
        ("run.steps=x", 'command line: run.steps: got "x"; write a whole number'),
        ("run.stepz=1", "command line: run.stepz: unknown key; did you mean run.steps?"),
        ("data.files=[a", "command line: data.files: not valid YAML"),
        ("data.system_prompt=\udce9", "command line: data.system_prompt: not valid YAML"),
    ],
)
def test_a_fault_on_the_command_line_says_so(override: str, fragment: str) -> None:
    write("c.yaml", COMPLETE)
    (error,) = errors_of("c.yaml", override)
    assert error.startswith(fragment)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"- 1\n", "holds a list"),
        (b"3\n", "cannot be read as a config file"),
        (b"\xff\xfe\x00", "cannot be read as a config file"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text: bytes, fragment: str) -> None:
    Path("c.yaml").write_bytes(text)
    (error,) = errors_of("c.yaml")
    assert error.startswith("c.yaml: ")
    assert fragment in error
    assert errors_of("none.yaml") == ["there is no config file none.yaml; check the name"]


def test_every_fault_is_reported_at_once_with_the_file_it_stands_in() -> None:
    write("base.yaml", "model: {dtype: fp8}\nrollout: {group: 3}\n")
    write(
        "c.yaml",
        "extends: base.yaml\nalgorithm: {name: rlsd, mix: 2, max_deviation: -1, clip: {low: 9}}\n",
    )
    assert [error.split(" ")[:2] for error in errors_of("c.yaml", "run.steps=x", "foo")] == [
        ["command", "line:"],  # foo
        ["base.yaml:", "rollout.group:"],
        ["base.yaml:", "model.dtype:"],
        ["command", "line:"],  # run.steps
        ["c.yaml:", "model.path:"],
        ["c.yaml:", "run.name:"],
        ["c.yaml:", "algorithm.clip.low"],
        ["c.yaml:", "algorithm.mix"],
        ["c.yaml:", "algorithm.max_deviation"],
    ]


def test_importing_the_configuration_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "megatron", "datasets", "numpy", "jaxtyping", "wandb"}
    program = (
        "import sys, megasd.cli, megasd.configuration.validate; "
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "omegaconf" in loaded
    assert not heavy & set(loaded)
