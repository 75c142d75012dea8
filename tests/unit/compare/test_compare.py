"""What a comparison makes of its config, before anything runs."""

import shutil
from pathlib import Path

import pytest

from megasd.cli import main
from megasd.compare.runs import Comparison, compose
from megasd.configuration.load import Config, ConfigError, differing_keys, load_config, to_yaml
from megasd.configuration.validate import run_folder
from megasd.evaluation.config import EvaluationConfig
from megasd.metrics.records import METRICS_FILE
from tests.unit.workspace import make_model, make_workspace, write

WARM = """
run: {name: warm, steps: 5}
model: {path: model}
data: {files: [solutions.jsonl], max_prompt_tokens: 100}
algorithm: {name: sft}
rollout: {prompts_per_step: 8, max_response_tokens: 100}
"""


@pytest.fixture(autouse=True)
def _inside_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_workspace(tmp_path))
    write("solutions.jsonl", '{"prompt": "1 + 1 =", "answer": "2", "solution": "1 + 1 = 2"}\n')
    write("warm.yaml", WARM)


def composed(*overrides: str, algorithms: str = "grpo,rlsd", launcher: str = "") -> Comparison:
    return compose("config.yaml", algorithms.split(","), 2, overrides, launcher)


def faults(*overrides: str, algorithms: str = "grpo,rlsd") -> list[str]:
    with pytest.raises(ConfigError) as failure:
        composed(*overrides, algorithms=algorithms)
    return failure.value.errors


def save_run(config: Config) -> None:
    """A folder with the config of a run, as far as a comparison looks."""
    folder = run_folder(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))


def test_runs_differ_by_method_and_seed_only() -> None:
    comparison = composed("run.seed=4")
    assert [(run.algorithm, run.seed) for run in comparison.runs] == [
        ("grpo", 4),
        ("grpo", 5),
        ("rlsd", 4),
        ("rlsd", 5),
    ]
    assert comparison.folder == Path("runs/tried-compare")
    assert comparison.runs[3].folder == Path("runs/tried-compare/rlsd-seed5")
    first, second, third, _ = (run.config for run in comparison.runs)
    assert differing_keys(first, second) == ["run.name", "run.seed"]
    sections = {key.partition(".")[0] for key in differing_keys(first, third)}
    assert sections == {"algorithm", "run", "teacher"}
    for run in comparison.runs:  # what `megasd train` will be given
        assert load_config(write("again.yaml", to_yaml(run.config))) == run.config


def test_what_the_file_sets_wins_over_a_method_and_is_told() -> None:
    comparison = composed("teacher.every=3", "optimizer.lr=2e-4", algorithms="grpo,rlsd,distil")
    assert comparison.overruled == {
        "grpo": {},
        "rlsd": {"teacher.every": (10, 3)},
        "distil": {"optimizer.lr": (5e-5, 2e-4)},
    }


def test_the_faults_of_all_methods_are_told_at_once_and_a_shared_one_once() -> None:
    errors = faults("optimizer.eps=0", "algorithm.mix_steps=5")
    assert len(errors) == 2
    assert "optimizer.eps" in errors[0]
    assert errors[1].startswith("grpo: command line: algorithm.mix_steps: unknown key")


@pytest.mark.parametrize(
    ("overrides", "algorithms", "said"),
    [
        ([], "grpo,grpo", "each named once"),
        ([], "grpo,glpo", "there is no algorithm 'glpo'; did you mean grpo?"),
        (["evaluation.files=[]"], "grpo,rlsd", "evaluation.files: methods are compared on"),
        (["compare.threshold=1.5"], "grpo,rlsd", "compare.threshold: 1.5 is out of range"),
        (["compare.warm_start=no.yaml"], "grpo,rlsd", "there is no config file no.yaml"),
    ],
)
def test_what_cannot_be_compared_is_said(overrides: list, algorithms: str, said: str) -> None:
    errors = faults(*overrides, algorithms=algorithms)
    assert len(errors) == 1
    assert said in errors[0]


def test_every_run_starts_from_the_warm_start_which_need_not_be_there_yet() -> None:
    make_model(Path("other"))
    warmed = "compare.warm_start=warm.yaml"
    comparison = composed(warmed, "model.path=gone")
    assert comparison.warm_start is not None
    assert comparison.warm_start.config.run.steps == 5
    assert {run.config.model.path for run in comparison.runs} == {"runs/warm/hf"}
    write("warm.yaml", WARM + "checkpoint: {export_hf: false}\n")
    assert ["checkpoint.export_hf" in error for error in faults(warmed)] == [True]


def test_a_folder_with_another_run_is_not_touched() -> None:
    warmed = "compare.warm_start=warm.yaml"
    save_run(load_config("warm.yaml", ["metrics.console=false"]))
    run = composed(warmed).runs[1]
    save_run(composed(warmed, "compare.threshold=0.1").runs[1].config)
    composed(warmed)  # neither says anything about the training
    shutil.rmtree(run.folder)
    save_run(composed(warmed, "optimizer.lr=0.5").runs[1].config)
    assert faults(warmed) == [
        "runs/tried-compare/grpo-seed1 holds a run of another configuration (optimizer.lr); "
        "remove that folder, or choose another run.name"
    ]
    shutil.rmtree("runs/warm")
    save_run(load_config("warm.yaml", ["run.seed=1"]))
    assert "compare.warm_start: warm.yaml: runs/warm holds a run of another" in faults(warmed)[0]


def test_a_run_is_complete_with_its_last_evaluation_and_its_export() -> None:
    run = composed().runs[0]
    (run.folder / "hf").mkdir(parents=True)
    write(str(run.folder / METRICS_FILE), '{"step": 9}\n')
    assert not run.is_complete
    write(str(run.folder / METRICS_FILE), '{"step": 9}\n{"step": 10}\n')
    assert run.is_complete
    (run.folder / "hf").rmdir()
    assert not run.is_complete


def test_under_a_launcher_the_layout_is_the_launchers() -> None:
    assert any("parallel.tensor" in error for error in faults("parallel.tensor=2"))
    launched = composed("parallel.tensor=2", launcher="torchrun --nproc-per-node 4 --no-python")
    assert launched.launcher == ("torchrun", "--nproc-per-node", "4", "--no-python")


def test_the_command_line_wants_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--algorithms", "grpo,rlsd"]) == 2
    assert "no config file" in capsys.readouterr().err
    assert main(["compare", "config.yaml", "--algorithms", "grpo", "evaluation.files=[]"]) == 2
    assert "methods are compared on held-out rows" in capsys.readouterr().err


def test_the_leakage_patterns_survive_a_saved_config() -> None:
    saved = write("saved.yaml", to_yaml(load_config("config.yaml")))
    assert load_config(saved).evaluation == EvaluationConfig(files=["held_out.jsonl"])
