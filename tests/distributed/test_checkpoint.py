"""A resumed run is the run that was never stopped; a failed save costs nothing but itself."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from megasd.testing.ranks import Ranks
from megasd.testing.tiny import tiny_qwen3, tiny_qwen3_moe
from tests.distributed import checkpoint_cases as cases
from tests.distributed import parking_cases, policy_cases

LAYOUTS = {
    "1 rank": (1, {}),
    "DP2": (2, {}),
    "TP2 SP PP2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "EP2": (2, {"expert": 2}),
    "TP2 SP EP2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    # On the first stage parameters and gradients in many buckets, as those of large models are.
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2, "ddp": {"bucket_size": 2000}}),
}
TEACHERS = {
    "ema": {"weights": "ema", "decay": 0.5},
    "snapshot": {"weights": "snapshot", "every": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied: across pipeline stages the embedding then stands twice, in a bucket of its own."""
    return tiny_qwen3(tmp_path_factory.mktemp("model"), vocab=121, norm_spread=0.2, tie=True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("experts"), vocab=121, norm_spread=0.2)


@pytest.mark.parametrize(
    ("layout", "teacher"),
    [("1 rank", "snapshot"), ("1 rank", "ema"), ("DP2", "ema"), ("TP2 SP PP2", "ema")],
)
def test_a_resumed_run_repeats_every_bit(
    layout: str, teacher: str, folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    world_size, settings = LAYOUTS[layout]
    # Warm-up, decay and bfloat16's master weights are state too.
    settings = settings | {"teacher": TEACHERS[teacher], "warmup": 4, "schedule": "cosine"}
    if teacher == "snapshot":
        settings["dtype"] = "bfloat16"
    whole = ranks.run(cases.save_in_the_middle, folder, tmp_path, settings, world_size=world_size)
    resumed = ranks.run(cases.resume, folder, tmp_path, settings, world_size=world_size)
    for rank, (one, (other, notes)) in enumerate(zip(whole, resumed, strict=True)):
        assert notes == []
        np.testing.assert_equal(other, one, err_msg=f"{layout}, rank {rank}")


def test_a_trainer_whose_memory_is_lent_between_steps_learns_the_same_to_the_bit(
    experts: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Dense parameters and experts, masters beside the weights, an average, a reference."""
    settings = {"expert": 2, "dtype": "bfloat16", "teacher": TEACHERS["ema"]}
    settings |= {"roles": ("reference",)}
    plain, lent = (
        ranks.run(
            parking_cases.lend_memory_between_steps,
            *(experts, tmp_path, settings | {"parks": parks}),
            world_size=2,
        )
        for parks in (False, True)
    )
    for one, other in zip(plain, lent, strict=True):
        whole, *pairs = other.pop("held")
        assert one.pop("held") == [whole] * 7
        assert pairs[1::2] == [whole] * 3
        assert pairs[::2] == [dict.fromkeys(whole, 0) | {"weights": whole["weights"]}] * 3
        assert all(size > 0 for size in whole.values())
        np.testing.assert_equal(other, one)


def test_a_run_resumed_with_more_steps_follows_the_schedule_of_its_own_configuration(
    folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Of a checkpoint come the moments and the count of steps, never a setting."""
    three, six = ({"schedule": "linear", "total_steps": n} for n in (3, 6))
    (first,) = ranks.run(
        cases.save_as_it_was_with_a_scheduler, folder, tmp_path, three, world_size=1
    )
    (resumed,) = ranks.run(cases.resume_with_other_settings, folder, tmp_path, six, world_size=1)
    rate = policy_cases.LEARNING_RATE
    assert first == pytest.approx([rate, rate * 2 / 3, rate / 3])
    assert resumed["rates"] == pytest.approx([rate * left / 6 for left in (3, 2, 1)])
    assert resumed["own"]
    assert resumed["steps"] == {3.0}


def test_a_run_whose_first_step_was_skipped_is_saved_and_resumes_with_an_adam_without_state(
    experts: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """As Transformer Engine's: a part of the optimizer for the experts, one for the rest."""
    given = (experts, tmp_path, {"dtype": "bfloat16", "expert": 2})
    whole = ranks.run(cases.save_before_the_first_step_of_another_adam, *given, world_size=2)
    resumed = ranks.run(cases.resume_before_the_first_step_of_another_adam, *given, world_size=2)
    np.testing.assert_equal(resumed, whole)
    assert whole[0]["version"] == 2


def test_a_step_that_is_given_up_leaves_the_one_before_it_to_go_on_from(
    folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    settings = LAYOUTS["DP2"][1] | {"teacher": TEACHERS["ema"]}
    whole = ranks.run(cases.give_a_step_up, folder, tmp_path, settings, world_size=2)
    resumed = ranks.run(cases.resume, folder, tmp_path, settings, world_size=2)
    np.testing.assert_equal([one for one, _ in resumed], whole)


def test_a_checkpoint_is_due_by_the_first_ranks_clock(
    folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    assert ranks.run(cases.save_by_time, folder, tmp_path, world_size=2) == [[2, 5]] * 2


@pytest.mark.parametrize(
    ("model", "saved", "resumed"),
    [
        ("qwen3", "TP2 SP PP2", "1 rank"),
        ("qwen3", "1 rank", "TP2 SP PP2"),
        ("qwen3_moe", "EP2", "1 rank"),
        ("qwen3_moe", "1 rank", "EP2"),
        ("qwen3_moe", "TP2 SP EP2", "1 rank"),
        ("qwen3_moe", "PP2 EP2", "TP2 SP EP2"),
    ],
)
def test_a_run_goes_on_in_another_layout_as_if_it_had_not_been_stopped(
    model: str,
    saved: str,
    resumed: str,
    folder: Path,
    experts: Path,
    tmp_path: Path,
    ranks: Ranks,
) -> None:
    """The steps after the first resumed one show whether the optimizer's state was right."""
    path = experts if model == "qwen3_moe" else folder
    more = {"teacher": TEACHERS["ema"], "warmup": 4, "schedule": "cosine"}
    world_size, settings = LAYOUTS[saved]
    whole, *_ = ranks.run(
        cases.save_in_the_middle, path, tmp_path, settings | more, world_size=world_size
    )
    world_size, settings = LAYOUTS[resumed]
    for rank, (other, notes) in enumerate(
        ranks.run(cases.resume, path, tmp_path, settings | more, world_size=world_size)
    ):
        fewer_or_more = LAYOUTS[saved][0] != world_size
        assert len(notes) == (rank == 0 and fewer_or_more)
        for note in notes:
            said = f"saved by {LAYOUTS[saved][0]} ranks, and {world_size} go on"
            assert f"step_000003 was {said}; their random states start anew" in note
        assert other["version"] == whole["version"]
        for step, (ours, expected) in enumerate(zip(other["seen"], whole["seen"], strict=True)):
            where = f"{saved} to {resumed}, rank {rank}, step {step}"
            for name, value in expected[0].items():
                assert ours[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), f"{where} {name}"
            assert ours[1] == expected[1], f"{where}: prompts"
            np.testing.assert_allclose(ours[3], expected[3], atol=1e-5, err_msg=where)
        for name, weight in whole["weights"].items():
            np.testing.assert_allclose(other["weights"][name], weight, atol=1e-5, err_msg=name)


def test_a_moving_average_that_was_saved_whole_goes_on_cut_over_the_ranks(
    experts: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """As every checkpoint of before has it."""
    settings = {"teacher": TEACHERS["ema"]}
    (whole,) = ranks.run(
        cases.save_a_moving_average_whole, experts, tmp_path, settings, world_size=1
    )
    for other, _ in ranks.run(
        cases.resume, experts, tmp_path, settings | {"expert": 2}, world_size=2
    ):
        np.testing.assert_allclose(other["seen"][0][3], whole["seen"][0][3], atol=1e-5)
        assert other["version"] == whole["version"]


def test_weights_load_in_another_layout(folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Saved at TP2 SP PP2, read by one rank: the odd vocabulary is padded differently."""
    world_size, settings = LAYOUTS["TP2 SP PP2"]
    settings = settings | {"teacher": TEACHERS["ema"]}
    ranks.run(cases.save_in_the_middle, folder, tmp_path, settings, world_size=world_size)
    (expected, *_) = ranks.run(
        cases.weights_after_three_steps, folder, settings, world_size=world_size
    )
    (read,) = ranks.run(cases.read_weights_in_another_layout, folder, tmp_path, {}, world_size=1)
    np.testing.assert_equal(read, expected)


def test_a_checkpoint_of_another_model_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks.run(cases.save_in_the_middle, folder, tmp_path / "run", {}, world_size=1)
    other = tiny_qwen3(tmp_path / "other", vocab=121, intermediate=96)
    run = tmp_path / "run"
    (said,) = ranks.run(cases.resume_what_is_not_this_run, other, run, world_size=1)
    assert "model.path: " in said
    assert "step_000003 was saved from another model" in said
    assert "differs in intermediate_size;" in said


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_full_disk_leaves_the_previous_checkpoint_good(
    failing_rank: int, folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    results = ranks.run(cases.fail_to_save, folder, tmp_path, failing_rank, world_size=2)
    assert results == [[1, 2], [1, 2]]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_000001", "step_000002"]


def test_a_disk_that_is_full_for_a_while_costs_a_run_nothing_but_the_checkpoint(
    folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Saved after a later step; where room stays away, the run stops after three failures."""
    said, silence = ranks.run(
        cases.save_on_a_disk_that_is_full_for_a_while, folder, tmp_path, world_size=2
    )
    assert silence == []
    assert len(said) == 2
    for step, sentence in zip((4, 5), said, strict=True):
        assert f"step_{step:06d} could not be written (rank 1: " in sentence
        assert sentence.endswith("the run goes on, and tries again")


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": (cut, r"has \d+ bytes instead of \d+|cannot be read"),
    "a bit": (flip, "has other bytes than were written|cannot be read"),
    "missing": (Path.unlink, "is missing|has no manifest"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_on_from_the_last_checkpoint_that_is_still_what_was_written(
    kind: str, folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    harm, words = DAMAGE[kind]
    weights, _ = ranks.run(cases.save_three, folder, tmp_path, world_size=2)
    checkpoints = tmp_path / "checkpoints"
    files = sorted(path.name for path in (checkpoints / "step_000003").iterdir())
    shards = [name for name in files if name.endswith(".distcp")]
    assert {*files} - {*shards} == {".metadata", "common.pt", "manifest.json", "metadata.json"}
    assert {name[:4] for name in shards} == {"__0_", "__1_"}, "of both ranks"
    sizes = {name: (checkpoints / "step_000003" / name).stat().st_size for name in shards}
    second = sum(size for name, size in sizes.items() if name.startswith("__1_"))
    # Half of the optimizer, which each holds for itself, and of the weights, which both hold.
    assert second / sum(sizes.values()) == pytest.approx(1 / 2, rel=0.05)
    (checkpoints / "partial_000009").mkdir()
    harm(checkpoints / "step_000003" / random.Random(kind).choice(files))
    found = ranks.run(cases.restore, folder, tmp_path, world_size=2)
    assert [len(said) for _, _, said, _ in found] == [1, 0], "the first rank speaks"
    for step, weight, said, refusal in found:
        assert (step, weight, refusal) == (2, weights[1], "")
        for sentence in said:
            assert re.search(
                rf"warning: .*step_000003 .*({words}).* is put aside as damaged_000003", sentence
            )
    left = ["damaged_000003", "step_000001", "step_000002"]
    assert sorted(path.name for path in checkpoints.iterdir()) == left

    ranks.run(cases.restore_and_save, folder, tmp_path, world_size=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000002", "step_000003"]


def test_without_a_whole_checkpoint_a_run_does_not_begin_again_by_itself(
    folder: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks.run(cases.save_three, folder, tmp_path, world_size=1)
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        cut(checkpoints / f"step_{step:06d}" / "common.pt")
    ((step, _, said, refusal),) = ranks.run(cases.restore, folder, tmp_path, world_size=1)
    assert (step, said) == (0, [])
    assert re.search("no checkpoint is whole: .*step_000003 common.pt has .*step_000001", refusal)
    assert len(list(checkpoints.glob("step_*"))) == 3, "nothing is taken away"


def test_megatrons_faults_are_still_there(folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Goes red when Megatron mends one: then its function in policy/megatron/fixes.py goes."""
    (found,) = ranks.run(cases.megatron_faults, folder, tmp_path, world_size=1)
    assert all(found.values()), found
