"""The policy equals Hugging Face, in every layout: what is scored, what is learned."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megasd.configuration.describe import stage_parameters
from megasd.policy.config import ParallelConfig
from megasd.testing.ranks import RankError, Ranks
from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from megasd.weights.hf_folder import read_hf_config
from tests.distributed import megatron_cases
from tests.distributed import policy_cases as cases

LAYOUTS = {
    "1 rank": (1, {}),
    "1 rank, other packing": (1, {"max_tokens": 50, "chunk": 1000}),
    "1 rank, recompute": (1, {"recompute": "full"}),
    "TP2": (2, {"tensor": 2}),
    "TP2 SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "DP4": (4, {}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 SP PP2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "TP2 DP2": (4, {"tensor": 2}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "EP2": (2, {"expert": 2}),
    "TP2 SP, whole experts": (2, {"tensor": 2, "sequence": True, "expert_tensor": 1}),
    "TP2 SP EP2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2}),
}
DENSE = [name for name in LAYOUTS if "EP2" not in name and "experts" not in name]
CASES = {
    "qwen3 tied": DENSE,
    "qwen3 untied": DENSE,
    "qwen3_moe": [
        *("1 rank", "1 rank, recompute", "EP2", "TP2 SP", "TP2 SP, whole experts"),
        *("TP2 SP EP2", "PP2 EP2"),
    ],
    "qwen3_moe, probabilities as they are": ["EP2"],
    "llama": ["1 rank", "TP2 PP2"],
}
CUTS = {field.name for field in dataclasses.fields(ParallelConfig)}
SEED = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """An odd vocabulary, so that TP pads it; norms that matter; RoPE with a base of its own."""
    root = tmp_path_factory.mktemp("models")
    same: Any = {"vocab": 121, "norm_spread": 0.2, "init_scale": 0.15}
    plain = same | {"rope_theta": 50_000.0}
    as_they_are = root / "as_they_are"
    return {
        "qwen3 tied": tiny_qwen3(root / "tied", tie=True, **plain),
        "qwen3 untied": tiny_qwen3(root / "untied", tie=False, **plain),
        "qwen3_moe": tiny_qwen3_moe(root / "moe", **plain),
        "qwen3_moe, probabilities as they are": tiny_qwen3_moe(
            as_they_are, norm_topk_prob=False, **plain
        ),
        # A base at which some of the 8 frequencies are scaled, some interpolated, some left.
        "llama": tiny_llama(root / "llama", hidden=64, rope_theta=5_000.0, **same),
    }


@pytest.fixture(scope="module")
def folder(folders: Mapping[str, Path]) -> Path:
    return folders["qwen3 untied"]


@cache
def reference(folder: Path) -> dict:
    """The same in transformers, one unpadded sequence at a time, with torch's own AdamW."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    views = cases.random_views(SEED, count=11, vocab=121)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cases.LEARNING_RATE, weight_decay=0.0)

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy = [], []
        for view in views:
            ids = torch.from_numpy(np.concatenate([view.prompt_ids, view.response_ids]))
            table = model(ids[None]).logits[0].log_softmax(-1)[len(view.prompt_ids) - 1 : -1]
            logprobs.append(table.gather(1, torch.from_numpy(view.response_ids)[:, None])[:, 0])
            entropy.append(-(table.exp() * table).sum(-1))
        return torch.cat(logprobs), torch.cat(entropy)

    with torch.no_grad():
        before = [x.numpy() for x in read()]
    losses, norms = [], []
    for step in range(cases.STEPS):
        _batch, credit = cases.batch_and_credit(views, seed=100 + step)
        logprobs, entropy = read()
        weights = credit.token_weights * (credit.path == 0) / (credit.path == 0).sum()
        loss = (-(logprobs + 0.1 * entropy) * credit.advantages * weights).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(float(loss))
        optimizer.step()
    with torch.no_grad():
        after = [x.numpy() for x in read()]
    with tempfile.TemporaryDirectory() as learnt:  # saved: in memory its experts are one tensor
        model.save_pretrained(learnt)
        saved = load_file(Path(learnt) / "model.safetensors")
    weights = {name: weight.numpy() for name, weight in saved.items()}
    return {"before": before, "after": after, "loss": losses, "norm": norms, "weights": weights}


@pytest.mark.parametrize(
    ("model", "layout"), [(model, layout) for model, layouts in CASES.items() for layout in layouts]
)
def test_every_layout_scores_and_learns_as_hugging_face_does(
    model: str, layout: str, folders: Mapping[str, Path], ranks: Ranks
) -> None:
    world_size, settings = LAYOUTS[layout]
    folder = folders[model]
    expected = reference(folder)
    parallel = ParallelConfig(**{name: settings[name] for name in settings.keys() & CUTS})
    planned = [
        stage_parameters(parallel, read_hf_config(folder), rank * parallel.pipeline // world_size)
        for rank in range(world_size)
    ]
    results = ranks.run(cases.score_and_learn, folder, settings, SEED, 121, world_size=world_size)
    for rank, result in enumerate(results):
        where = f"{layout}, rank {rank}"
        for name, ours, theirs in zip(
            ("logprobs", "entropy"), result["before"], expected["before"], strict=False
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=f"{where} {name}")
        losses = [metrics["loss"] for metrics in result["metrics"]]
        norms = [metrics["grad_norm"] for metrics in result["metrics"]]
        np.testing.assert_allclose(losses, expected["loss"], rtol=1e-4, atol=1e-6, err_msg=where)
        np.testing.assert_allclose(norms, expected["norm"], rtol=1e-4, err_msg=where)
        for ours, theirs in zip(result["after"], expected["after"], strict=False):
            np.testing.assert_allclose(ours, theirs, atol=5e-4, rtol=0, err_msg=where)
        assert result["num_parameters"] == planned[rank]
        assert result["weights"].keys() == expected["weights"].keys()
        for name, weight in result["weights"].items():
            np.testing.assert_allclose(
                weight, expected["weights"][name], atol=2e-4, rtol=0, err_msg=f"{where} {name}"
            )


def test_llama_3s_frequencies_are_those_of_transformers(ranks: Ranks) -> None:
    """At the true sizes of Llama 3.1 8B and 3.2 1B."""
    for head_dim, factor in ((128, 8.0), (64, 32.0)):
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters=scaling)
        (found,) = ranks.run(cases.frequencies, config.to_dict(), world_size=1)
        theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        assert attention_factor == 1
        np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-6)


def test_what_layers_on_a_gpu_do_otherwise_changes_no_score(
    folders: Mapping[str, Path], ranks: Ranks
) -> None:
    (found,) = ranks.run(
        cases.what_layers_on_a_gpu_do_otherwise, folders["qwen3 untied"], world_size=1
    )
    plain, repeated, rounded = found["scores"]
    np.testing.assert_allclose(repeated, plain, atol=1e-6)
    np.testing.assert_array_equal(rounded, repeated)
    assert found["asked"] == {1024}, "one entry in Megatron's cache, whatever the lengths"


def test_the_tests_of_a_gpu_can_join_their_world_once_each_in_one_process(ranks: Ranks) -> None:
    assert ranks.run(cases.join_a_world_of_its_own_twice, world_size=1) == [(1, True)]


def test_megatrons_faults_with_experts_are_still_there(
    folders: Mapping[str, Path], ranks: Ranks
) -> None:
    """Goes red when Megatron mends one: then its function in policy/megatron/fixes.py goes."""
    (found,) = ranks.run(megatron_cases.faults_with_experts, folders["qwen3_moe"], world_size=1)
    assert all(found.values()), found


def test_local_layers_add_their_gradients_in_place_on_a_gpu_where_apex_can(
    folder: Path, ranks: Ranks
) -> None:
    case = megatron_cases.who_adds_weight_gradients_in_place
    (found,) = ranks.run(case, folder, world_size=1)
    assert found == {"apex": True, "nothing": False, "apex, on a CPU": False}


def test_ranks_of_an_expert_that_would_gather_unevenly_are_refused_on_a_cpu(
    folders: Mapping[str, Path], ranks: Ranks
) -> None:
    uneven = {"expert_tensor": 2, "expert": 2}
    for said in ranks.run(cases.refusal, folders["qwen3_moe"], uneven, world_size=4):
        assert "parallel.expert_tensor: " in said
        assert "gloo on a CPU cannot; set it to 1" in said


def test_the_learning_rate_warms_up_from_one_kth_and_decays_from_its_top(
    folder: Path, ranks: Ranks
) -> None:
    """Of every parameter group; step k after the warm-up is at (k - 1) / steps of the decay."""
    base = cases.LEARNING_RATE
    settings = {"warmup": 2, "schedule": "cosine"}
    (cosine,) = ranks.run(cases.learning_rates, folder, settings, 6, world_size=1)
    decay = [base * 0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    np.testing.assert_allclose(cosine, [base / 2, base, *decay], rtol=1e-6, atol=1e-12)
    assert cosine[-1] > 0, "the last step's rollouts are not for nothing"


@pytest.mark.parametrize("model", ["qwen3 untied", "qwen3_moe"])
def test_a_step_is_adamws_at_the_schedules_rate_on_gradients_clipped_by_their_common_norm(
    model: str, folders: Mapping[str, Path], ranks: Ranks
) -> None:
    """Against torch's own, from Megatron's gradients: dense parameters and experts together."""
    settings = {"clip": 0.125, "weight_decay": 0.5, "schedule": "linear", "warmup": 1}
    settings |= {"betas": (0.5, 0.75), "eps": 1e-3, "total_steps": 3}
    (steps,) = ranks.run(cases.steps_and_gradients, folders[model], settings, world_size=1)
    start = {name: torch.nn.Parameter(value) for name, value in steps[0]["before"].items()}
    parts = [[p for p in start.values() if (p.ndim > 1) == decays] for decays in (True, False)]
    assert all(parts)
    adam = torch.optim.AdamW(
        [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}],
        betas=(0.5, 0.75),
        eps=1e-3,
        weight_decay=0.5,
    )
    for step, share in zip(steps, (1.0, 1.0, 0.5), strict=True):
        for name, parameter in start.items():
            parameter.grad = step["gradients"][name].clone()
        norm = torch.nn.utils.clip_grad_norm_(start.values(), 0.125)
        assert norm > 0.25, "it clips"
        for group in adam.param_groups:
            group["lr"] = cases.LEARNING_RATE * share
        adam.step()
        assert step["metrics"]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert step["metrics"]["lr"] == pytest.approx(cases.LEARNING_RATE * share)
        for name, parameter in start.items():
            np.testing.assert_allclose(
                step["after"][name], parameter.detach(), rtol=0, atol=1e-7, err_msg=name
            )


@pytest.mark.parametrize(
    ("layout", "world_size"), [({}, 1), ({}, 2), ({"pipeline": 2}, 2)], ids=["1", "DP2", "PP2"]
)
def test_a_mini_batch_without_weights_runs_nothing_and_changes_nothing_on_any_rank(
    layout: dict, world_size: int, folder: Path, ranks: Ranks
) -> None:
    for found in ranks.run(cases.learn_nothing_in_between, folder, layout, world_size=world_size):
        assert found["outcomes"] == ["stepped", "empty", "empty", "stepped"]
        assert found["metrics"] == [{"tokens_in_update": 0.0}] * 2
        assert found["same"], "weights, moments and the number of steps behind them"
        assert found["version"] == 2
        shares = [lr / cases.LEARNING_RATE for lr in found["rates"]]
        assert shares == pytest.approx([1.0, 0.5]), "it has no place in the schedule"


@pytest.mark.parametrize(
    ("model", "layout"),
    [("qwen3 tied", {}), ("qwen3_moe", {"expert": 2}), ("qwen3 untied", {"pipeline": 2})],
    ids=["DP2", "EP2", "PP2"],
)
def test_gradients_are_reduced_beside_the_backward_pass_and_parameters_gathered_beside_the_next(
    model: str, layout: dict, folders: Mapping[str, Path], ranks: Ranks
) -> None:
    """To the bit as without, ranks without a token and experts without one among them.

    But for the last bit of the norm that gradients are clipped by: shards are others.
    """
    settings = layout | {"clip": 0.0, "max_tokens": 48}  # several micro-batches
    plain, cut = (
        ranks.run(
            megatron_cases.steps_and_traffic,
            folders[model],
            settings | {"ddp": ddp, "settles": "bucket_size" not in ddp},
            world_size=2,
        )
        for ddp in ({"overlap_grad_reduce": False}, {"bucket_size": 3000})
    )
    for rank, (one, other) in enumerate(zip(plain, cut, strict=True)):
        for name, weight in one["weights"].items():
            np.testing.assert_array_equal(other["weights"][name], weight, err_msg=name)
        assert other["head was gathered"], "for who reads it outside of a forward pass"
        buckets = other["buckets"]
        assert buckets > 2 or "pipeline" in layout
        gathers, reduces, over = ["gather"] * buckets, ["reduce"] * buckets, ["backward is over"]
        traffic, values, kept = zip(*other["steps"], strict=True)
        # The first time Megatron counts what becomes ready.
        waits = rank == 0 or "pipeline" not in layout
        assert traffic[0] == gathers + ([*over, *reduces] if waits else [*reduces, *over])
        step = [*gathers, *reduces, *over]
        assert traffic[1:] == (step, step, step + gathers, reduces + over)
        assert values == (2, 2, 0, 2, 2), "log-probs and entropy, where somebody asks for them"
        assert kept == (True, True, False, rank == 0, True)
        if "expert" in layout:
            assert other["fewest tokens of an expert"] == 0


def test_frozen_parameters_are_passed_by_on_stages_that_train_nothing_too(
    folder: Path, ranks: Ranks
) -> None:
    """All but one layer's: the other stage's optimizer is a stub, and it has no gradients."""
    for stage, found in enumerate(
        ranks.run(cases.train_one_layer_only, folder, {"pipeline": 2}, world_size=2)
    ):
        assert found["outcomes"] == ["stepped", "skipped"]
        assert {name.split(".")[2] for name in found["changed"]} == ({"0"} if stage == 0 else set())
        assert set(found["bad"]) == (set(found["changed"]) if stage == 0 else set())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_gradient_or_loss_that_is_not_finite_skips_the_step_on_all_ranks(
    what: str, world_size: int, folder: Path, ranks: Ranks
) -> None:
    for result in ranks.run(cases.skip_a_broken_step, folder, what, world_size=world_size):
        (first, broken, last) = result["seen"]
        assert (first[:2], broken[:2], last[:2]) == ((False, False), (True, True), (False, False))
        assert np.isfinite(first[2:]).all()
        assert not np.isfinite(broken[2])
        assert np.isfinite(broken[3]) == (what == "loss"), "its gradients were all right"
        assert (result["version"], result["skipped"]) == (2, 1)
        shares = [lr / cases.LEARNING_RATE for lr in result["rates"]]
        assert shares == pytest.approx([1.0, 0.75, 0.75]), (
            "skipped, it used up none of the schedule"
        )


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=["DP2", "PP2"])
def test_too_many_skipped_updates_in_a_row_stop_all_ranks_with_one_sentence_and_a_bundle(
    layout: dict, folder: Path, ranks: Ranks, tmp_path: Path
) -> None:
    results = ranks.run(cases.stop_when_stuck, folder, tmp_path, layout, world_size=2)
    bundle = tmp_path / "diagnostics" / "step_000002"
    for result in results:
        assert result["step"] == 2, "two, then one that was not skipped; the third of the new ones"
        assert (result["learnt"], result["same"]) == (True, True)
        assert result["said"] == results[0]["said"]
    assert re.fullmatch(
        r"step 2: 3 optimizer steps in a row were skipped .* Not finite: gradients of \d+ "
        rf"parameters on rank {'[01]' if layout else 1}, .* and on 1 more ranks. "
        rf"{bundle} holds .* --resume {tmp_path}`.*",
        results[0]["said"],
    )
    assert (bundle / "config.yaml").read_text() == "run: {}\n"
    rows = [json.loads(line) for line in (bundle / "rollouts.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == [f"{i} =" for i in range(6)]
    assert rows[0]["reward"] == "inf", "JSON knows no infinity"
    tensors = torch.load(bundle / "batch.pt", weights_only=True)
    assert tensors["updates.1.logprobs"].shape == tensors["credit.advantages"].shape
    summary = json.loads((bundle / "summary.json").read_text())
    assert summary["tensors"] == {}, "nothing but gradients was broken"
    assert [update["outcome"] for update in summary["updates"]] == ["skipped", "skipped"]
    found = [set(by_update[1]) for by_update in summary["gradients"]]
    layers = [{name.split(".")[2] for name in names if ".layers." in name} for names in found]
    if layout:
        assert layers == [{"0"}, {"1"}], "the model's numbers"
    else:
        assert layers[1] == {"0", "1"}, "the other has but its shard of the sum"


def test_a_run_whose_bundle_cannot_be_written_stops_all_the_same(
    folder: Path, ranks: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "diagnostics").write_text("a file, where a folder must be made")
    for result in ranks.run(cases.stop_when_stuck, folder, tmp_path, {}, world_size=2):
        assert result["step"] == 2
        assert "step_000002 could not be written: NotADirectoryError" in result["said"]


def test_each_tokens_loss_is_corrected_by_the_truncated_mismatch_at_the_sampling_temperature(
    folder: Path, ranks: Ranks
) -> None:
    (found,) = ranks.run(cases.mismatch_and_temperature, folder, world_size=1)
    advantages, token_weights, path = found["credit"]
    correction = found["shift"].exp().clamp(max=1.5)
    loss = -(found["logprobs"] + 0.1 * found["entropy"]) * advantages * correction
    expected = (loss * token_weights * (path == 0)).sum() / (path == 0).sum()
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_work_is_spread_in_order_and_a_workers_error_reaches_every_rank(ranks: Ranks) -> None:
    expected = [(0, 0), (0, 1), (0, 4), (2, 9), (2, 16), (2, 25), (2, 36)]
    assert ranks.run(cases.spread_work, 4, None, world_size=4) == [expected] * 4
    with pytest.raises(RankError) as failure:
        ranks.run(cases.spread_work, 4, 2, world_size=4)
    for rank in range(4):
        assert f"rank {rank}: " in str(failure.value)
    assert str(failure.value).count("rank 2 failed") == 4
