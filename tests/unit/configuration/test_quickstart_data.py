import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_quickstart_data as quickstart
import numpy as np
import pytest

from megasd.configuration.load import Loaded, read_config
from megasd.configuration.validate import validate
from megasd.data.context import PrivilegedContext
from megasd.data.datasets import load_prompts
from megasd.data.tokenizer import load_tokenizer
from megasd.rewards.verifiers import verify
from megasd.testing.tiny import tiny_qwen3
from megasd.types import Rollout, Verdict

CONFIGS = Path(__file__).parents[3] / "configs"
INPUTS = "runs/quickstart-inputs"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory as the quickstart makes it, with fewer rows."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("SFT_ROWS", 2000), ("RL_ROWS", 60), ("HELD_OUT_ROWS", 40)):
            patch.setattr(quickstart, name, count)
        patch.chdir(folder)
        quickstart.write_quickstart_data(Path(INPUTS), seed=0)
        tiny_qwen3(Path(INPUTS, "model"))
        yield folder


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(INPUTS, name).read_text().splitlines()]


def loaded(name: str) -> Loaded:
    return read_config(CONFIGS / name)


def expression(row: dict[str, Any]) -> str:
    return row["prompt"].partition(": ")[2].partition(" =")[0]


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("name", ["quickstart_sft.yaml", "quickstart.yaml"])
def test_the_configs_are_valid_and_every_row_and_response_fits(name: str) -> None:
    read = loaded(name)
    assert read.errors + validate(read, world_size=1, new_run=True) == []
    config = read.config
    assert config is not None
    tokenizer = load_tokenizer(config.model.path)
    prompts = load_prompts(config.data, tokenizer, require_solution=True).prompts
    assert tokenizer.unk_token_id not in np.concatenate([prompt.token_ids for prompt in prompts])
    for prompt in prompts:
        response = tokenizer.encode(str(prompt.solution), add_special_tokens=False)
        assert len(response) + 1 <= config.rollout.max_response_tokens


@pytest.mark.usefixtures("workspace")
def test_the_scorer_pays_for_worked_and_blurted_answers_and_for_no_other() -> None:
    config = loaded("quickstart.yaml").config
    assert config is not None
    assert config.reward.binary  # the task pays a share of 1 where the answer is only contained
    pattern = config.data.answer_pattern
    for row in rows("heldout.jsonl"):
        judged = row["verifier"], row["answer"], row["metadata"]

        def reward(response: str, name: str, answer: str, metadata: dict[str, Any]) -> float:
            return verify(name, response, answer, metadata, pattern)[0]

        assert reward(row["solution"], *judged) == 1.0
        assert reward(f"#{row['answer']}", *judged) == 1.0
        assert reward(f"#{int(row['answer']) + 1}", *judged) < 1.0
        assert reward(row["answer"], *judged) == 0.0  # no "#"


@pytest.mark.usefixtures("workspace")
def test_the_teacher_reads_the_answer_as_the_warm_start_taught_it() -> None:
    config = loaded("quickstart.yaml").config
    assert config is not None
    tokenizer = load_tokenizer(config.model.path)
    privileged = PrivilegedContext(
        config.context,
        tokenizer,
        {},
        max_context_tokens=512,
        success_threshold=1.0,
        answer_pattern=config.data.answer_pattern,
        seed=0,
        vocab_size=len(tokenizer),
    )
    taught = next(row for row in rows("sft.jsonl") if "[answer" in row["prompt"])
    plain = load_prompts(config.data, tokenizer).prompts[0]
    prompt = replace(
        plain,
        messages=({"role": "user", "content": taught["prompt"].partition(" [")[0]},),
        answer=taught["answer"],
    )
    response = np.array([7, 8])
    rollout = Rollout(
        prompt=prompt,
        group_id=0,
        sample=0,
        token_ids=response,
        logprobs=None,
        text="",
        finish_reason="stop",
        policy_version=0,
    )
    (text,) = privileged.texts("teacher", [rollout], [Verdict()], step=0)
    assert text is not None
    view = privileged.view(rollout, text)
    assert view is not None
    assert tokenizer.decode(view.prompt_ids) == f"<|user|>{taught['prompt']}<|assistant|>"


@pytest.mark.usefixtures("workspace")
def test_the_warm_start_turns_from_worked_solutions_to_blurts_and_hints_throughout() -> None:
    sft = rows("sft.jsonl")
    is_worked = np.array([";" in row["solution"] for row in sft])
    is_hinted = np.array(["[answer: " in row["prompt"] for row in sft])
    assert is_worked[:1200].all()
    assert np.mean(is_worked[1200:]) == pytest.approx(0.3, abs=0.06)
    for part in (is_hinted[:1200], is_hinted[1200:]):
        assert np.mean(part) == pytest.approx(0.4, abs=0.06)
    for row in sft:
        final = eval(expression(row))
        assert row["answer"] == str(final)
        *steps, answer = row["solution"].split(";")
        assert answer == f"#{final}"
        for step in steps:
            left, _, right = step.partition("=")
            assert eval(left) == int(right) >= 0


@pytest.mark.usefixtures("workspace")
def test_held_out_expressions_are_never_trained_on() -> None:
    held_out = {expression(row) for row in rows("heldout.jsonl")}
    trained = {expression(row) for name in ("sft.jsonl", "rl.jsonl") for row in rows(name)}
    assert len(held_out) == 40
    assert not held_out & trained


def test_the_seed_decides_what_is_trained_on_and_not_what_is_held_out(workspace: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.glob("*.jsonl")}

    first = files(workspace / INPUTS)
    for seed in (0, 1):
        quickstart.write_quickstart_data(workspace / f"seed{seed}", seed)
    assert files(workspace / "seed0") == first
    other = files(workspace / "seed1")
    assert {name for name in first if first[name] == other[name]} == {"heldout.jsonl"}
