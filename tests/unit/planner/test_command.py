"""`megasd plan`: sizes as published, bytes that follow the layout, suggestions that can run."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import megasd
from megasd.configuration.describe import stage_parameters
from megasd.configuration.load import ConfigError
from megasd.planner.buffers import held_bytes, total_parameters
from megasd.planner.command import add_plan_command, make_plan
from megasd.planner.hardware import GIB, parse_gpus
from megasd.planner.model import Model
from megasd.planner.presets import preset
from megasd.planner.report import as_text, as_values
from megasd.policy.config import ParallelConfig

CONFIGS = Path(__file__).parents[3] / "configs"
RLSD = str(CONFIGS / "jobs" / "rlsd_8b_1node.yaml")
PUBLISHED = {
    "8B": 8_190_735_360,
    "32B": 32_762_123_264,
    "30B-A3B": 30_532_122_624,
    "235B-A22B": 235_093_634_560,
}


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_plan_command(parser.add_subparsers())
    args = parser.parse_args(["plan", *arguments])
    return args.run(args)


def held(*items: str, gpus: str = "H200:8", **options: Any) -> dict[str, int]:
    plan = make_plan([RLSD, *items], gpus=gpus, suggest=False, **options)
    return as_values(plan)["bytes_per_rank"]


def seconds(*items: str, gpus: str = "H200:8", **options: Any) -> dict[str, float]:
    plan = make_plan([RLSD, *items], gpus=gpus, suggest=False, **options)
    return as_values(plan)["seconds_per_step"]


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_preset_has_the_parameters_that_are_published(size: str) -> None:
    assert total_parameters(Model.of(preset(size))) == PUBLISHED[size]


@pytest.mark.parametrize(
    ("size", "parallel", "gpus"),
    [
        ("8B", ParallelConfig(tensor=4, sequence=True, pipeline=2), 64),
        ("30B-A3B", ParallelConfig(tensor=2, sequence=True, expert=8), 32),
        ("235B-A22B", ParallelConfig(tensor=4, sequence=True, pipeline=2, expert=32), 256),
    ],
)
def test_a_rank_of_a_preset_holds_what_the_dry_run_says(
    size: str, parallel: ParallelConfig, gpus: int
) -> None:
    """Filled up to a multiple of its owners; 12 bytes per parameter over those of each part."""
    model = Model.of(preset(size))
    for stage in range(parallel.pipeline):
        found = held_bytes(model, parallel, world_size=gpus, stage=stage, dtype_bytes=2)
        assert found.parameters == stage_parameters(parallel, model.hf_config, stage)
        assert found.weights * 2 == found.gradients
        assert 0 <= found.weights // 2 - found.parameters < 2 * 128 * gpus
    everywhere = sum(
        held_bytes(model, parallel, world_size=gpus, stage=stage, dtype_bytes=2).optimizer
        for stage in range(parallel.pipeline)
    ) * (gpus // parallel.pipeline)
    copies = everywhere / (12 * PUBLISHED[size])  # above 1: norms and routers, once per tp rank
    assert copies == pytest.approx(1.0, rel=1e-3)


def test_json_says_whether_it_fits_and_gives_bytes_by_kind_and_seconds_by_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(RLSD, "--gpus", "H200:8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["parameters"] == PUBLISHED["8B"]
    assert set(found["seconds_per_step"]) == {"sync", "rollout", "score", "update"}
    assert all(value > 0 for value in found["seconds_per_step"].values())
    assert set(found["peak_bytes"]) == {"sync", "rollout", "score", "update"}
    kinds = found["bytes_per_rank"]
    assert set(kinds) == {
        *("weights", "gradients", "optimizer", "teacher", "batch", "activations", "head", "float8"),
        *("working", "scoring", "engine_weights", "engine_cache", "sync_buckets"),
        *("engine_asleep", "context", "nccl", "margin"),
    }
    assert all(isinstance(value, int) for value in kinds.values())
    assert max(kinds, key=kinds.__getitem__) == found["largest"]


def test_what_does_not_fit_is_exit_code_1_and_says_what_takes_the_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(RLSD, "parallel.tensor=1", "parallel.sequence=false", "--gpus", "H100:8") == 1
    text = capsys.readouterr().out
    assert "does NOT fit" in text
    assert "most is gradients" in text


@pytest.mark.parametrize(
    ("size", "gpus", "items"),
    [
        ("8B", "H100:8", []),
        ("32B", "H200:16", ["parallel.tensor=8"]),
        ("30B-A3B", "B200:32", ["parallel.expert=8"]),
        ("235B-A22B", "H200:512", ["parallel.expert=32", "parallel.pipeline=2"]),
    ],
)
def test_suggestions_run_as_they_are_and_fit(size: str, gpus: str, items: list[str]) -> None:
    """Planned again with the overrides that it printed, each layout is what was promised."""
    start = time.process_time()
    plan = make_plan([RLSD, *items], gpus=gpus, model=size)
    assert time.process_time() - start < 10
    assert plan.layouts
    order = [round(layout.duration.total, 1) * layout.gpus for layout in plan.layouts]
    assert order == sorted(order)
    layout = plan.layouts[0]
    overrides = [f"{k}={'null' if v is None else v}" for k, v in layout.overrides.items()]
    again = make_plan([RLSD, *items, *overrides], gpus=gpus, model=size, suggest=False)
    assert not again.faults
    assert again.fits
    assert again.memory == layout.memory
    assert f"{layout.duration.total:.1f}" in as_text(plan)


def test_a_layout_that_is_impossible_is_named_and_others_are_suggested() -> None:
    plan = make_plan([RLSD, "parallel.tensor=3"], gpus="H200:8")
    assert not plan.fits
    assert any(fault.startswith("parallel.tensor: 3") for fault in plan.faults)
    assert plan.layouts
    assert "It cannot run as it is" in as_text(plan)


def test_where_nothing_fits_beside_the_engines_lighter_ones_are_suggested_and_their_own_nodes() -> (
    None
):
    """235B in bfloat16 is 55 GiB on each GPU of a node: too much beside a trainer on 79, unless its
    memory is lent to them, and there is not much else on the GPU."""
    layouts = make_plan([RLSD], gpus="H100:256", model="235B-A22B").layouts
    assert {one.overrides["rollout.vllm.park_trainer"] for one in layouts} == {True}
    assert not any("rollout.vllm.quantization" in one.overrides for one in layouts)
    fuller = make_plan([RLSD], gpus="H100:256", model="235B-A22B", assume=["context_gib=14"])
    layouts = fuller.layouts
    *here, alone = (layout.overrides for layout in layouts)
    assert {one["rollout.vllm.quantization"] for one in here} == {"fp8"}
    assert alone["rollout.vllm.placement"] == "server"
    assert "rollout.vllm.quantization" not in alone
    more = alone["rollout.vllm.engines"] * alone["rollout.vllm.tensor"]
    assert layouts[-1].gpus == 256 + more
    assert not make_plan([RLSD], gpus="H100:8", model="235B-A22B").layouts


def test_an_engine_is_as_large_as_its_model_needs() -> None:
    """Not of 8 GPUs for an 8B: they would meet twice in each layer, for every token."""
    for layout in make_plan([RLSD], gpus="H200:64").layouts:
        assert layout.config.rollout.vllm.tensor <= 4


def test_bytes_follow_the_layout_the_teacher_and_the_recomputation() -> None:
    base = held()
    wider = held("parallel.tensor=4")
    assert wider["weights"] == pytest.approx(base["weights"] / 2, rel=0.01)
    assert wider["optimizer"] == pytest.approx(base["optimizer"], rel=0.01)
    twice = held(gpus="H200:16")
    assert twice["optimizer"] == pytest.approx(base["optimizer"] / 2, rel=0.01)
    assert held("teacher.weights=live")["teacher"] == 0
    average = held("teacher.weights=ema")
    assert average["teacher"] == pytest.approx(base["teacher"] * 2 / 4, rel=0.01), "cut over DP4"
    assert average["scoring"] == base["scoring"] + average["weights"], "whole for the pass"
    states = [
        held("algorithm.name=gkd", "teacher.weights=frozen", f"parallel.tensor={ways}")["batch"]
        for ways in (2, 4)
    ]
    assert states[0] == states[1], "of a GPU's share of the tokens, whatever the cut"
    none = held("model.recompute=none")
    assert none["activations"] > 10 * base["activations"]
    assert none["working"] < base["working"]
    local = held("model.layers=local", "model.recompute=none")
    assert local["activations"] > 1.5 * none["activations"], "Megatron's own keep more"
    one = held("rollout.engine=hf")
    assert one["engine_asleep"] == 0
    wide = held("optimizer.max_tokens_per_microbatch=40960")["head"]
    assert base["head"] < wide < 2 * base["head"]  # a gradient of its weight, two blocks of logits


def test_what_is_parked_is_room_for_engines_and_comes_back_before_the_scores() -> None:
    def peaks(*items: str) -> dict[str, int]:
        return as_values(make_plan([RLSD, *items], gpus="H200:8", suggest=False))["peak_bytes"]

    kinds, plain = held(), peaks()
    parked = peaks("rollout.vllm.park_trainer=true")
    given = kinds["gradients"] + kinds["optimizer"] + kinds["teacher"]
    for phase, peak in plain.items():
        assert peak - parked[phase] == (given if phase in ("sync", "rollout") else 0)
    # Gradients are freed; the rest goes to the host and comes back, at 20 GB/s.
    lent = seconds("rollout.vllm.park_trainer=true")["rollout"] - seconds()["rollout"]
    moved = kinds["optimizer"] + kinds["teacher"]
    assert lent == pytest.approx(2 * moved / 20e9)


def test_float8_has_copies_of_the_layers_weights_while_a_pass_lasts() -> None:
    """Of 8.19e9 parameters 2 x 151,936 x 4,096 are not the layers'; two of a parameter go back."""
    layers = (8_190_735_360 - 2 * 151_936 * 4096) / 2  # TP2
    base, both = held(), held("model.fp8={}")
    assert base["float8"] == 0
    assert both["float8"] == pytest.approx(2 * layers, rel=1e-3)
    assert both["scoring"] - base["scoring"] == pytest.approx(layers, rel=1e-3)
    scored = held("model.fp8={train: false}")
    assert (scored["float8"], scored["scoring"]) == (0, both["scoring"])
    time, quick = seconds(), seconds("model.fp8={train: false}")
    assert quick["update"] == time["update"]
    assert 1 / 1.4 < quick["score"] / time["score"] < 0.9
    ends = seconds("model.fp8={train: false, first_last_bf16: 9}")["score"]  # half of 36 layers
    assert ends == pytest.approx((quick["score"] + time["score"]) / 2)


def test_a_microbatch_is_no_longer_than_what_a_replica_reads() -> None:
    few = ["rollout.prompts_per_step=4", "rollout.group_size=2", "algorithm.name=grpo"]
    short = ["data.max_prompt_tokens=100", "rollout.max_response_tokens=200"]
    assert held(*few, *short)["activations"] < 0.2 * held()["activations"]


def test_a_pipeline_holds_as_many_microbatches_as_it_has_stages_left() -> None:
    """Stage 0 of 4 has four in flight, of a quarter of the layers: as much as one stage of all."""
    items = ["model.recompute=none", "rollout.vllm.gpu_memory_utilization=0.05"]
    whole = make_plan([RLSD, *items], gpus="H200:8", suggest=False).memory
    cut = make_plan([RLSD, *items, "parallel.pipeline=4"], gpus="H200:8", suggest=False).memory
    assert whole is not None
    assert cut is not None
    assert cut.stage == 0
    assert cut.activations == pytest.approx(whole.activations, rel=0.05)


def test_more_gpus_are_quicker_and_longer_responses_are_not() -> None:
    base, twice = seconds(), seconds(gpus="H200:16")
    assert twice["update"] == pytest.approx(base["update"] / 2, rel=0.05)
    assert twice["rollout"] < base["rollout"]
    longer = seconds(assume=["mean_length=1.0"])
    assert all(longer[phase] > base[phase] for phase in ("rollout", "score", "update"))
    assert seconds("model.recompute=none")["update"] < 0.85 * base["update"]
    assert seconds("teacher.weights=live", "algorithm.name=grpo")["score"] < base["score"]
    larger = seconds("teacher.weights=checkpoint", "teacher.path=models/Qwen3-32B")
    assert larger["score"] > 2 * base["score"]
    assert larger["update"] == base["update"]
    stages = make_plan([RLSD, "parallel.pipeline=4"], gpus="H200:8", suggest=False).duration
    assert stages is not None
    assert stages.bubble > 0


def test_the_table_of_the_page_is_what_the_planner_says() -> None:
    page = (Path(megasd.__file__).parent / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| 8B \| (\S+) \| .* \| (\d+) \| ([\d,]+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 3
    for gpus, gib, step in rows:
        best = make_plan([RLSD], gpus=gpus).layouts[0]
        assert (f"{best.memory.peak / GIB:.0f}", f"{best.duration.total:,.0f}") == (gib, step)


def test_the_planner_imports_no_torch() -> None:
    """The planner's own files do arithmetic only."""
    for file in (Path(__file__).parents[3] / "megasd" / "planner").glob("*.py"):
        assert "import torch" not in file.read_text(), file


def test_the_command_is_known_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys, megasd.planner.command;"
        "print(sorted({'torch', 'omegaconf', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["H200", "H200:0", "A100:8", "8:H200"])
def test_gpus_that_nobody_knows_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write a type and a number of GPUs, like H200:64"):
        parse_gpus(text)


def test_faulty_input_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"--assume speed=1: give one of .*mean_length"):
        make_plan([RLSD], gpus="H200:8", assume=["speed=1"])
    with pytest.raises(ValueError, match=r"model.path: there is no folder nowhere"):
        make_plan([RLSD, "model.path=nowhere"], gpus="H200:8")
    with pytest.raises(ConfigError, match="no config file; name one"):
        make_plan(["run.steps=3"], gpus="H200:8")
    assert parse_gpus("h200:64").gpu.memory_bytes == 140 * GIB
