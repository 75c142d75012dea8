"""A run that can no longer learn says so and stops, and goes on from where it was."""

import json
from pathlib import Path

import pytest
import torch

from megasd.configuration.load import load_config
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.testing.forked import complete
from tests.end_to_end import workspace

PROMPTS = 4  # of a step
OVERFLOWS = [False, True, False, True, True, False]  # by step: rewards that no float32 can hold


@pytest.mark.slow
def test_updates_skipped_in_a_row_stop_a_run_with_a_bundle_and_it_resumes(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path)
    rows = [
        {"prompt": f"{step} + {i} =", "answer": str(step + i), "metadata": {"overflows": overflows}}
        for step, overflows in enumerate(OVERFLOWS)
        for i in range(PROMPTS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"data.files=[{folder}/rows.jsonl]",
        "data.shuffle=false",
        "data.verifier=tests.end_to_end.verifiers:beyond_float32",
        "evaluation.files=[]",
        "optimizer.minibatches_per_step=1",
        "optimizer.schedule=constant",
        "optimizer.max_skipped_in_a_row=2",
    ]
    done = workspace.train(
        workspace.config(folder, "stuck", steps=len(OVERFLOWS), every=1), *settings
    )
    stuck = folder / "stuck"
    assert done.returncode == 2, done.stderr
    assert "step 4: 2 optimizer steps in a row were skipped" in done.stderr
    assert "Not finite: batch.rewards of rollout " in done.stderr
    skipped = [row["update/skipped"] for row in read_rows(stuck / METRICS_FILE)]
    assert skipped == [0, 1, 0, 1, 1], "one alone does not stop it; the last has its row too"

    bundle = stuck / "diagnostics" / "step_000004"
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    assert load_config(bundle / "config.yaml") == load_config(stuck / "config.yaml")
    tensors = torch.load(bundle / "batch.pt", weights_only=True)
    assert {"batch.rewards", "teachers.teacher.logprobs", "credit.advantages"} <= tensors.keys()
    infinite = tensors["batch.rewards"].isinf().nonzero()[:, 0].tolist()
    rollouts = [json.loads(line) for line in (bundle / "rollouts.jsonl").read_text().splitlines()]
    assert [row["rollout"] for row in rollouts if row["reward"] == 1e39] == infinite
    assert {row["messages"][-1]["content"] for row in rollouts} == {f"4 + {i} =" for i in range(4)}
    summary = json.loads((bundle / "summary.json").read_text())
    assert summary["tensors"]["batch.rewards"]["rollouts"] == infinite
    assert summary["updates"][0]["loss"] == "nan"

    # The weights: those of a run that ended before the two.
    whole = workspace.config(folder, "whole", steps=3)
    done = workspace.train(whole, *settings)
    assert done.returncode == 0, done.stderr
    exported = folder / "exported"
    done = complete(workspace.start("export", stuck, "--to", exported))
    assert done.returncode == 0, done.stderr
    name = "model.safetensors"
    assert (exported / name).read_bytes() == (folder / "whole" / "hf" / name).read_bytes()

    done = workspace.train("--resume", stuck)
    assert done.returncode == 0, done.stderr
    skipped = [row["update/skipped"] for row in read_rows(stuck / METRICS_FILE)]
    assert skipped == [0, 1, 0, 1, 1, 0], "from the last checkpoint, counting anew"
