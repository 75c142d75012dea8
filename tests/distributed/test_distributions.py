"""What a scoring pass leaves behind is the dense distribution, in every layout, token by token."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megasd.losses.config import MismatchConfig
from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from tests.distributed import distribution_cases as cases

VOCAB = 121
WIDTHS = (cases.TOP_K, cases.TOP_K, cases.SAMPLES, 32)  # ids, log-probs, samples, hidden states
LAYOUTS = {
    "1 rank": (1, {}),
    "TP2 DP2": (4, {"tensor": 2}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "TP2 SP PP2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(
        tmp_path_factory.mktemp("model"), vocab=VOCAB, norm_spread=0.2, init_scale=0.15
    )


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("experts"), vocab=VOCAB, norm_spread=0.2)


@cache
def dense(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [N, V] of student and teacher views by transformers; NaN without a view."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def read(views: Any) -> np.ndarray:
        tables = []
        for view, student in zip(views, student_views, strict=True):
            if view is None:
                tables.append(np.full((len(student.response_ids), VOCAB), np.nan))
                continue
            ids = torch.from_numpy(np.concatenate([view.prompt_ids, view.response_ids]))
            logits = model(ids[None]).logits[0] / 0.8
            tables.append(logits.log_softmax(-1)[len(view.prompt_ids) - 1 : -1].numpy())
        return np.concatenate(tables)

    student_views, teacher_views = cases.views_of(5, VOCAB)
    return read(student_views), read(teacher_views)


@cache
def head(folder: Path) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_output_embeddings().weight.detach().numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_supports_cross_entropies_and_samples_are_those_of_the_dense_distributions(
    layout: str, folder: Path, ranks: Ranks
) -> None:
    world_size, settings = LAYOUTS[layout]
    student, teacher = dense(folder)
    has_view = ~np.isnan(teacher[:, 0])
    top = np.argsort(-np.nan_to_num(teacher), axis=1, kind="stable")[:, : cases.TOP_K]
    seen: list[int] = []
    for rank, found in enumerate(
        ranks.run(cases.read_everything, folder, settings, VOCAB, world_size=world_size)
    ):
        where = f"{layout}, rank {rank}"
        tokens = found["tokens"]
        read = tokens[has_view[tokens]]
        is_read = has_view[tokens]
        assert (found["index"][tokens[~is_read]] == -1).all(), where
        ways = settings.get("tensor", 1)
        for (rows, columns), width in zip(found["kept"], WIDTHS, strict=False):
            assert columns == -(-width // ways), f"{where}: each rank keeps its share"
            assert rows == len(read) + 1, f"{where}: and of the tokens that it reads"
        if settings.get("tensor", 1) == 1 or rank % 2 == 0:
            seen += read.tolist()
        for name, of, at in (
            ("teacher top", teacher, teacher),
            ("student top", student, student),
            ("teacher at student", student, teacher),
        ):
            ids, logprobs = found[name]
            rows = tokens if at is student else read
            keep = slice(None) if at is student else is_read
            best = np.argsort(-of[rows], axis=1, kind="stable")[:, : cases.TOP_K]
            np.testing.assert_array_equal(ids[keep], best, err_msg=f"{where} {name}")
            expected = np.take_along_axis(at[rows], best, axis=1)
            np.testing.assert_allclose(logprobs[keep], expected, atol=1e-4, err_msg=where)
        if found["hidden"] is not None:
            logits = torch.from_numpy(found["hidden"][is_read] @ head(folder).T / 0.8)
            np.testing.assert_allclose(logits.log_softmax(-1), teacher[read], atol=1e-4)
        # H^x over the teacher's top K and one more bucket for the rest, on every rank.
        t = np.take_along_axis(teacher, top, axis=1)[has_view]
        s = np.take_along_axis(student, top, axis=1)[has_view]
        rest = [np.log1p(-np.exp(x).sum(1)) for x in (t, s)]
        cross = -(np.exp(t) * s).sum(1) - np.exp(rest[0]) * rest[1]
        np.testing.assert_allclose(
            found["cross entropy"][has_view], cross, atol=2e-4, err_msg=where
        )
        drawn = found["samples"][is_read]
        assert ((drawn >= 0) & (drawn < VOCAB)).all()
        chosen = np.take_along_axis(student[read], drawn, axis=1)
        np.testing.assert_allclose(
            found["cross entropy of samples"][read], -chosen.mean(1), atol=2e-4, err_msg=where
        )
    assert sorted(set(seen)) == np.flatnonzero(has_view).tolist(), "each token is read somewhere"


def test_samples_follow_the_teacher_and_are_the_same_in_every_layout(
    folder: Path, ranks: Ranks
) -> None:
    _, teacher = dense(folder)
    (alone,) = ranks.run(cases.read_everything, folder, {}, VOCAB, world_size=1)
    read = ~np.isnan(teacher[:, 0])
    # Mean log-prob of the draws against its expectation; a standard error is about 0.03.
    drawn = np.take_along_axis(teacher[read], alone["samples"][read], axis=1).mean()
    expected = (np.exp(teacher[read]) * teacher[read]).sum(1).mean()
    assert drawn == pytest.approx(expected, abs=0.15)
    world_size, settings = LAYOUTS["TP2 DP2"]
    differing = total = 0
    for found in ranks.run(cases.read_everything, folder, settings, VOCAB, world_size=world_size):
        same = found["samples"] == alone["samples"][found["tokens"]]
        differing += int((~same[read[found["tokens"]]]).sum())
        total += same.size
    assert differing <= total * 1e-3, "a draw may fall within a rounding error of the next id"


def test_a_pass_holds_what_was_asked_for_and_each_value_by_itself(
    folder: Path, ranks: Ranks
) -> None:
    """Whoever keeps the log-probs keeps 4 bytes per token, whatever else was read."""
    (found,) = ranks.run(cases.what_a_pass_holds, folder, world_size=1)
    size = found["bytes"]
    assert found["plain"] == ([size] * 2, False)
    assert found["top k"] == ([size] * 2, True)
    assert found["cross entropy"] == ([size] * 3, False), "ids and log-probs that nobody reads"


def test_hidden_states_are_kept_once_while_they_are_read(folder: Path, ranks: Ranks) -> None:
    """In their place from the first on: not collected, and copied into one tensor at the end."""
    ((kept, most),) = ranks.run(cases.most_that_a_pass_holds, folder, world_size=1)
    assert most == pytest.approx(kept, rel=0.1)


def test_the_reference_keeps_the_initial_weights_and_live_follows(
    folder: Path, ranks: Ranks
) -> None:
    settings = {"tensor": 2, "roles": ("reference",)}
    (initial,) = ranks.run(cases.initial_logprobs, folder, VOCAB, world_size=1)
    for found in ranks.run(cases.teacher_logprobs, folder, settings, VOCAB, world_size=2):
        np.testing.assert_allclose(found["reference"], initial, atol=1e-4)
        assert np.abs(found["teacher"] - initial).max() > 1e-3, "live: it has learnt"


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [({}, 2), ({"expert": 2}, 4), ({"tensor": 2, "sequence": True, "pipeline": 2}, 4)],
    ids=["DP2", "EP2 DP2", "TP2 SP PP2"],
)
def test_a_moving_average_is_cut_over_the_ranks_and_whole_in_place(
    layout: dict[str, int], world_size: int, experts: Path, ranks: Ranks
) -> None:
    """Against the formula, in float64, on every rank's own parameters."""
    settings = layout | {"teacher": {"weights": "ema", "decay": 0.75}}
    for found in ranks.run(cases.averages, experts, settings, world_size=world_size):
        assert found["difference"] < 1e-6
        assert found["moved"] > 1e-4
        assert found["kept"] == found["share"]


@pytest.mark.parametrize("layout", ["1 rank", "TP2 SP PP2"])
def test_a_checkpoint_teacher_is_another_model_of_other_shape(
    layout: str, folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    other = tiny_qwen3(
        tmp_path / "other",
        vocab=VOCAB,
        hidden=48,
        layers=4,
        intermediate=96,
        tie=False,
        seed=9,
        init_scale=0.15,
    )
    (expected,) = ranks.run(cases.initial_logprobs, other, VOCAB, world_size=1)
    world_size, settings = LAYOUTS[layout]
    teacher = {"weights": "checkpoint", "path": str(other)}
    for found in ranks.run(
        cases.teacher_logprobs,
        folder,
        settings | {"teacher": teacher},
        VOCAB,
        world_size=world_size,
    ):
        np.testing.assert_allclose(found["teacher"], expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["1 rank", "PP2 DP2"])
@pytest.mark.parametrize(
    "mismatch",
    [
        MismatchConfig(level="token", clip=1.5),
        MismatchConfig(level="token", reject=(0.6, 2.0)),
        MismatchConfig(level="sequence", clip=1.5),
        MismatchConfig(level="sequence", reject=(0.1, 3.0)),
    ],
    ids=["token", "token, reject", "sequence", "sequence, reject"],
)
def test_the_update_corrects_and_rejects_tokens_or_whole_rollouts(
    layout: str, mismatch: MismatchConfig, folder: Path, ranks: Ranks
) -> None:
    world_size, settings = LAYOUTS[layout]
    for found in ranks.run(cases.corrected_loss, folder, mismatch, settings, world_size=world_size):
        advantages, token_weights, path = found["credit"]
        shift, rollouts = found["shift"], found["rollout_ids"]
        if mismatch.level == "sequence":
            shift = torch.stack([found["shift"][rollouts == r].sum() for r in rollouts])
        ratio = shift.clamp(-20, 20).exp()
        stays = path == 0
        if mismatch.reject is not None:
            low, high = mismatch.reject
            stays = stays & (ratio >= low) & (ratio <= high)
            assert 0 < stays.sum() < (path == 0).sum()
        loss = -(found["logprobs"] + 0.1 * found["entropy"]) * advantages
        loss = loss * ratio.clamp(max=mismatch.clip) * token_weights
        expected = loss[stays].sum() / stays.sum()
        assert found["metrics"]["loss"] == pytest.approx(float(expected), rel=1e-4)
