import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_claims_data as claims
import numpy as np
import pytest

from megasd.configuration.load import load_config
from megasd.data.datasets import load_prompts
from megasd.data.tokenizer import load_tokenizer
from megasd.rewards.verifiers import verify
from megasd.testing.tiny import tiny_qwen3

CONFIGS = Path(__file__).parents[3] / "configs" / "claims"
DATA = Path("runs/claims/recall-data")  # as the configs name it
HARD = [f"hard-{number}.jsonl" for number in range(claims.SETS)]


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory as tools/show_claims.py makes it, with fewer rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "SFT_ROWS", 2000)
        patch.setattr(claims, "SECRET_ROWS", 200)
        patch.chdir(tmp_path_factory.mktemp("claims"))
        claims.write_recall_data(DATA, seed=0)
        tiny_qwen3("runs/quickstart-inputs/model")
        yield


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize("name", HARD)
def test_a_policy_blind_to_the_prompt_is_right_on_at_most_one_hard_prompt(name: str) -> None:
    assert len({row["prompt"] for row in rows(name)}) == len({row["answer"] for row in rows(name)})
    assert len(rows(name)) == 26


def test_hard_sets_ask_the_same_questions_and_share_no_answer() -> None:
    sets = [rows(name) for name in HARD]
    assert len({tuple(row["prompt"] for row in one) for one in sets}) == 1
    assert len({row["answer"] for one in sets for row in one}) == 26 * claims.SETS


def test_the_warm_start_never_reads_a_hard_prompt() -> None:
    hard = {row["prompt"] for row in rows("hard-0.jsonl")}
    for row in rows("sft.jsonl") + rows("secrets.jsonl"):
        assert row["prompt"].partition(" [")[0] not in hard


def test_half_of_the_warm_start_carries_the_password_and_the_rest_says_nothing_of_it() -> None:
    hinted = ["[answer: " in row["prompt"] for row in rows("sft.jsonl")]
    assert np.mean(hinted) == pytest.approx(claims.HINTED, abs=0.05)
    for row, is_hinted in zip(rows("sft.jsonl"), hinted, strict=True):
        assert (row["answer"] in row["prompt"]) == is_hinted
    assert not any("[answer" in row["prompt"] for row in rows("secrets.jsonl"))


def test_the_teacher_reads_the_password_as_the_warm_start_taught_it() -> None:
    assert load_config(CONFIGS / "recall.yaml").context.template == claims.HINT


@pytest.mark.parametrize("name", ["recall_sft.yaml", "recall.yaml"])
def test_every_prompt_and_response_fits_and_is_of_known_tokens(name: str) -> None:
    config = load_config(CONFIGS / name)
    tokenizer = load_tokenizer("runs/quickstart-inputs/model")
    for prompt in load_prompts(config.data, tokenizer).prompts:
        response = tokenizer.encode(f"#{prompt.answer}", add_special_tokens=False)
        assert len(response) + 1 == config.rollout.max_response_tokens - 1 == claims.LETTERS + 2
        assert tokenizer.unk_token_id not in [*prompt.token_ids, *response]


def test_only_the_whole_password_is_paid() -> None:
    pattern = load_config(CONFIGS / "recall.yaml").data.answer_pattern
    row = rows("hard-0.jsonl")[0]

    def reward(response: str) -> float:
        return verify(row["verifier"], response, row["answer"], {}, pattern)[0]

    assert reward(f"#{row['answer']}") == 1.0
    assert reward(f"#{row['answer'][:-1]}") == reward(row["answer"]) == 0.0
