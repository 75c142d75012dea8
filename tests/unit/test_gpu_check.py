"""tools/gpu_check.py with steps of its own, and its table against the files that it names."""

import ast
import importlib.util
import json
import re
import shlex
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import bench_gpu
import gpu_check
import make_tiny_model
import psutil
import pytest
import torch
from gpu_check import STEPS, Check, Step

from megasd.configuration.load import read_config
from megasd.configuration.validate import validate
from megasd.planner.model import Model
from megasd.weights.hf_folder import HFFolder, read_hf_config

ROOT = Path(__file__).parents[2]


def run(
    folder: Path, *steps: Step, budget: float = 60.0, width: int = 4
) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Exit code, the JSON, and its steps by their names."""
    check = Check(folder, folder / "found.json", budget, width, show=5)
    check.run(steps)
    found = json.loads((folder / "found.json").read_text())
    return check.print_table(), found, {one["step"]: one for one in found["steps"]}


def step(name: str, command: str, limit: float = 20.0, **more: Any) -> Step:
    return Step(name=name, command=command, limit=limit, **more)


def has_ended(pid: int) -> bool:
    """Or will in a moment: it was killed."""
    for _ in range(500):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie":
            return True
        time.sleep(0.01)
    return False


def test_it_goes_on_after_a_step_that_fails_or_hangs_and_writes_what_came_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What hangs has a child in a session of its own, as a run has an engine."""
    hangs = "setsid sleep 77 & echo child=$!; echo so far; wait"
    figures = 'echo \'..FIGURES {{"a": 1.5, "b": 1}}\'; echo \'FIGURES {{"b": 2}}\''
    code, found, steps = run(
        tmp_path,
        step("fails", "echo first; echo why >&2; exit 3"),
        step("hangs", hangs, limit=0.5),
        step("figures", f"{figures}; echo 'FIGURES {{{{'; echo end"),
        step("tests", "echo '== 2 passed, 1 skipped in 0.1s =='; echo later", alone=True),
        step("without", "exit 1", needs=("no_such_package",)),
    )
    assert code == 1
    assert {name: (one["state"], one["rc"]) for name, one in steps.items()} == {
        "fails": ("failed", 3),
        "hangs": ("limit", 124),
        "figures": ("ok", 0),
        "tests": ("ok", 0),
        "without": ("skipped", None),
    }
    assert steps["fails"]["last"] == ["first", "why"]
    assert steps["hangs"]["last"][-1] == "so far"
    assert 0.5 <= steps["hangs"]["seconds"] < 10
    assert has_ended(int(steps["hangs"]["last"][0].partition("=")[2]))
    assert steps["figures"]["figures"] == {"a": 1.5, "b": 2}
    assert steps["without"]["last"] == ["no_such_package is not installed"]
    assert found.keys() == {"started", "commit", "seconds", "steps"}
    keys = {"step", "state", "rc", "seconds", "limit", "began", "command", "figures", "last"}
    assert all(one.keys() == keys for one in found["steps"])
    assert (tmp_path / "fails.log").read_text() == "first\nwhy\n"
    said = capsys.readouterr().out
    assert "2 passed, 1 skipped in 0.1s" in said.partition("state")[2]
    assert "b = 2" in said


def test_checks_run_side_by_side_and_measurements_alone(tmp_path: Path) -> None:
    """The first of each pair waits for a file that the second makes."""
    waits = "until [ -e {folder}/FILE ]; do sleep 0.02; done"
    makes = "touch {folder}/FILE"
    beside = [step("1", waits.replace("FILE", "x")), step("2", makes.replace("FILE", "x"))]
    code, _, _ = run(tmp_path, *beside)
    assert code == 0
    beside = [step("1", waits.replace("FILE", "y"), 0.4), step("2", "true", alone=True)]
    _, _, steps = run(tmp_path, *beside)
    assert steps["1"]["state"] == "limit"
    assert steps["2"]["began"] >= 0.4


def test_who_interrupts_it_ends_its_steps_too(tmp_path: Path) -> None:
    """And finds what came of those before."""
    check = Check(tmp_path, tmp_path / "found.json", 60.0, 4, show=0)
    beside = step("beside", "echo $$ >{folder}/pid; sleep 77")
    interrupts = step(
        "interrupts", "until [ -s {folder}/pid ]; do sleep 0.02; done; kill -INT $PPID"
    )
    with pytest.raises(KeyboardInterrupt):
        check.run(
            [step("before", "true", alone=True), beside, interrupts, step("late", "", alone=True)]
        )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["steps"][0]["state"] == "ok"
    assert "late" not in {one["step"] for one in found["steps"]}
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_step_for_which_no_time_is_left_is_not_started(tmp_path: Path) -> None:
    late = step("late", "touch {own}/here", limit=30.0)
    code, _, steps = run(tmp_path, late, budget=5.0)
    assert (code, steps["late"]["state"], steps["late"]["rc"]) == (1, "not started", None)
    _, _, steps = run(tmp_path, step("soon", "sleep 60", limit=30.0), budget=gpu_check.LEAST + 0.0)
    assert steps["soon"]["state"] == "not started"


def test_a_step_is_all_of_its_world_and_finds_this_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    prints = "echo ${{SLURM_NTASKS-none}} $PYTHONPATH $LAYERS; pwd"
    _, _, steps = run(tmp_path, step("says", prints, environment={"LAYERS": "local"}))
    assert steps["says"]["last"] == [f"none {ROOT}:/elsewhere local", str(ROOT)]


def test_steps_are_chosen_by_name_in_their_order() -> None:
    def names(*arguments: Any) -> list[str]:
        return [one.name for one in gpu_check.chosen(STEPS, *arguments)]

    everything = [one.name for one in STEPS]
    assert names(None, None, "") == everything
    assert names("rl_vllm,te", None, "") == ["te", "rl_vllm"]
    assert names(None, "rl_vllm", "vllm_moe") == [
        name for name in everything[everything.index("rl_vllm") :] if name != "vllm_moe"
    ]
    with pytest.raises(ValueError, match="no step vlm, tea"):
        names("vlm,te", None, "tea")


def test_the_sum_of_the_limits_is_that_of_steps_side_by_side() -> None:
    steps = [step(name, "", limit) for name, limit in (("a", 9), ("b", 4), ("c", 4), ("d", 2))]
    assert gpu_check.at_worst(steps, width=1) == 19
    assert gpu_check.at_worst(steps, width=2) == 10  # a and d beside b and c
    assert gpu_check.at_worst([*steps, step("e", "", 5, alone=True)], width=2) == 15
    assert gpu_check.at_worst([*steps, step("e", "", 5, alone=True), *steps], width=9) == 23


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_it_says_why_and_what_it_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--folder", str(tmp_path / "left")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"nothing is run: torch {torch.__version__}")
    assert not (tmp_path / "left").exists()
    assert gpu_check.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert listed in said
    for number, one in enumerate(STEPS):
        line = listed.splitlines()[number]
        assert re.fullmatch(rf" *\d+ {one.name} +{one.limit:.0f} s  .+", line)
    assert f"{gpu_check.at_worst(STEPS, 6):.0f} s" in listed


def words(one: Step) -> list[str]:
    python, folder, own = "python", "/folder", "/own"
    return shlex.split(one.command.format(python=python, folder=folder, own=own))


@pytest.mark.parametrize("one", STEPS, ids=lambda one: one.name)
def test_what_a_step_names_is_there(one: Step, tmp_path: Path) -> None:
    """Files, tests in them, modules, packages, and arguments that their parsers take."""
    given = words(one)
    files = [word for word in given if re.match(r"(tools|tests|configs)/", word)]
    modules = [after for word, after in pairwise(given) if word == "-m"]
    assert files or modules
    for word in files:
        file, _, test = word.partition("::")
        assert (ROOT / file).exists(), file
        if test:
            functions = ast.walk(ast.parse((ROOT / file).read_text()))
            names = {node.name for node in functions if isinstance(node, ast.FunctionDef)}
            assert test.partition("[")[0] in names, test
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module
    if "tools/bench_gpu.py" in given:
        bench_gpu.parser().parse_args(given[given.index("tools/bench_gpu.py") + 1 :])


def test_every_file_of_tests_gpu_has_a_step() -> None:
    named = set()
    for one in STEPS:
        for before, word in pairwise(words(one)):
            named |= {word.partition("::")[0]} if before != "--ignore" else set()
    for file in (ROOT / "tests/gpu").glob("test_*.py"):
        assert str(file.relative_to(ROOT)) in named


@pytest.mark.parametrize("name", ["rl_hf", "rl_float8"])
def test_the_tiny_runs_have_valid_configs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model that their command makes."""
    (one,) = gpu_check.chosen(STEPS, name, None, "")
    command = one.command.format(python="python", folder=tmp_path, own=tmp_path)
    make, train = map(shlex.split, command.split("&&")[1:3])
    monkeypatch.setattr(sys, "argv", make[1:])
    make_tiny_model.main()
    (tmp_path / "inputs").mkdir()
    for file in ("rl", "heldout"):
        row = '{"prompt": "1 + 1 =", "answer": "2"}\n'
        (tmp_path / "inputs" / f"{file}.jsonl").write_text(row)
    path, *overrides = train[train.index("train") + 1 :]
    loaded = read_config(ROOT / path, overrides)
    assert loaded.errors == []
    assert validate(loaded, world_size=1, new_run=True, will_run_here=False) == []


def figures_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """That gpu_check gathers of what bench_gpu prints."""
    bench_gpu.main(["--device", "cpu", "--repeats", "1", *arguments])
    return gpu_check.figures_in(capsys.readouterr().out)


def test_head_and_machine_are_measured_on_a_cpu_too(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tokens", "24", "--hidden", "16", "--vocab", "100")
    head = figures_of(capsys, "head", *sizes)
    for name in ("torch_step", "jsd_step", "reverse_kl_step", "plain_step", "floor_divergence"):
        assert head[name] > 0
    assert head["torch_step_of_floor"] == pytest.approx(
        head["torch_step"] / head["floor_step"], rel=1e-2
    )
    assert not any("failed" in name for name in head)
    machine = figures_of(capsys, "machine", "--size", "32")
    assert machine["torch"] == torch.__version__
    assert machine["product_tflops"] > 0
    assert bench_gpu.peak("cpu") is None


def test_the_passes_are_those_of_layers_of_qwen3_8b(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Themselves they are measured in tests/distributed, of a smaller model."""

    def measure(device: str, folder: Path, **_: Any) -> Any:
        model = Model.of(read_hf_config(folder))
        assert HFFolder(folder).problems(model.table) == []
        yield {"layers": model.layers, "head": model.head_weights}

    takes = create_autospec(bench_gpu.measure_passes, side_effect=measure)
    monkeypatch.setattr(bench_gpu, "measure_passes", takes)
    found = figures_of(capsys, "passes", "--layers", "2", "--fp8", "blockwise")
    assert found == {"layers": 2, "head": 4096 * 151_936}


def test_the_figures_of_a_run_are_those_of_its_last_step(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [
        {"step": 0, "time/step": 9.0},
        {"step": 1, "time/step": 1.23456, "engine/probe_gap": 1e-3, "data/epoch": 0.5},
        {"step": 2, "evaluation/accuracy": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench_gpu.last_step(tmp_path) == {"time/step": 1.235, "engine/probe_gap": 1e-3}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_a_share_of_the_peak_is_of_a_gpu_that_the_planner_knows(
    name: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    gpu = bench_gpu.peak("cuda")
    assert (gpu.name if gpu else None) == expected
