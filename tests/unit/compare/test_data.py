"""The data of configs/compare.yaml: what it teaches, what fits, what is held out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_compare_data
import numpy as np
import pytest

from megasd.compare.runs import compose
from megasd.data.datasets import load_prompts
from megasd.data.tokenizer import load_tokenizer
from megasd.testing.tiny import tiny_qwen3

ROOT = Path(__file__).parents[3]
INPUTS = Path("runs/compare-inputs")


@pytest.fixture(scope="module", autouse=True)
def _workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory as the recipe expects it, with fewer rows."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("SFT_ROWS", 1000), ("RL_ROWS", 60), ("HELD_OUT_ROWS", 40)):
            patch.setattr(make_compare_data, name, count)
        patch.chdir(folder)
        make_compare_data.write_compare_data(INPUTS, seed=0)
        tiny_qwen3(Path("runs/quickstart-inputs/model"))
        (folder / "configs").symlink_to(ROOT / "configs")
        yield


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (INPUTS / name).read_text().splitlines()]


def expression(row: dict[str, Any]) -> str:
    return row["prompt"].partition(": ")[2].partition(" =")[0]


def test_the_comparison_is_valid_for_every_kind_of_method_and_every_row_fits() -> None:
    names = ["grpo", "rlsd", "dasd", "distil", "sdpo", "rlrt"]
    comparison = compose("configs/compare.yaml", names, 2, [], "")
    assert comparison.warm_start is not None
    # A method reads what its paper says: the warm start has taught to read each of them.
    sources = {run.algorithm: run.config.context.sources for run in comparison.runs}
    assert sources["rlsd"] == ["answer"]
    assert sources["dasd"] == ["solution"]
    assert sources["sdpo"] == ["sibling"]
    for config in (comparison.warm_start.config, comparison.config):
        tokenizer = load_tokenizer("runs/quickstart-inputs/model")
        prompts = load_prompts(config.data, tokenizer, require_solution=True).prompts
        read = np.concatenate([prompt.token_ids for prompt in prompts])
        assert tokenizer.unk_token_id not in read
        for prompt in prompts:
            response = tokenizer.encode(str(prompt.solution), add_special_tokens=False)
            assert len(response) + 1 <= config.rollout.max_response_tokens
            assert len(response) <= comparison.config.context.max_tokens


def test_hints_are_answers_solutions_and_blurts_of_the_row_itself() -> None:
    kinds = []
    for row in rows("sft.jsonl"):
        total = eval(expression(row))
        assert row["answer"] == str(total)
        assert row["solution"].split(";")[-1] == f"#{total}"
        hint = row["prompt"].partition(" [answer: ")[2].removesuffix("]")
        if hint:
            assert hint.rpartition("#")[2] == str(total)
            kinds.append("worked" if ";" in hint else "blurt" if "#" in hint else "answer")
    assert len(kinds) / 1000 == pytest.approx(0.4, abs=0.05)
    shares = [kinds.count(kind) / len(kinds) for kind in ("answer", "worked", "blurt")]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.07)


def test_held_out_expressions_are_never_trained_on_and_the_same_for_every_seed() -> None:
    held_out = {expression(row) for row in rows("heldout.jsonl")}
    assert len(held_out) == 40
    assert not held_out & {expression(row) for n in ("sft.jsonl", "rl.jsonl") for row in rows(n)}
    for seed in (0, 1):
        make_compare_data.write_compare_data(Path(f"seed{seed}"), seed)
    for name, differs in (("sft.jsonl", True), ("rl.jsonl", True), ("heldout.jsonl", False)):
        first = (INPUTS / name).read_bytes()
        assert Path("seed0", name).read_bytes() == first
        assert (Path("seed1", name).read_bytes() != first) == differs
