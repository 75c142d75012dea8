"""A run that learns nothing says so, with the likely cause: not at once, not again and again."""

import json

import pytest

from megasd.loop.health import PATIENCE, SIGNS, Health

WELL = {
    "update/tokens_in_update": 100.0,
    "update/grad_norm": 0.3,
    "reward/equal_groups": 0.5,
    "reward/mean": 0.4,
    "reward/errors": 2.0,
    "rollout/sampled": 16.0,
    "rollout/truncated": 0.5,
    "teacher/gap_max": 3.0,
    "teacher/has_context": 0.5,
    "fp8/abs_mean": 0.02,
}
ILL = {
    "no_gradient": ({"update/grad_norm": 0.0}, "gave no token a weight"),
    "equal_rewards": ({"reward/equal_groups": 1.0}, "reward/mean is 0.4: the prompts are all too"),
    "verifier_errors": ({"reward/errors": 9.0}, "9 of 16 in this step: mend data.verifier"),
    "responses_cut": ({"rollout/truncated": 0.95}, "rollout.max_response_tokens is too small"),
    "fp8_differs": ({"fp8/abs_mean": float("nan")}, "by nan in the mean, more than 0.1: keep more"),
    "teacher_agrees": ({"teacher/gap_max": 1e-8}, "look at context.sources"),
}


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", dict.fromkeys(sign.name for sign in SIGNS))
def test_a_sign_is_said_once_it_stays_and_once_more_at_the_end(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, cause = ILL[name]
    health = Health(speaks=True)
    for step in range(2):
        assert health.watch(step, WELL | change)[f"health/{name}"] == 1
    assert health.watch(2, WELL) == {f"health/{sign.name}": 0 for sign in SIGNS}
    health.watch(3, WELL | change)
    health.watch(4, WELL | change)
    assert said(capsys) == [], "never for three in a row"
    for step in range(5, 9):
        health.watch(step, WELL | change)
    (line,) = said(capsys)
    assert line.startswith(f"megasd: warning: step 5: for {PATIENCE} steps ")
    assert cause in line
    health.sum_up()
    (line,) = said(capsys)
    assert line.startswith("megasd: warning: in 8 of 9 steps ")
    assert cause in line


def test_the_cause_of_a_missing_gradient_is_what_the_same_step_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    causes = {
        "all too hard or all mastered": {"reward/equal_groups": 1.0},
        "no rollout had a privileged context": {"teacher/has_context": 0.0},
    }
    for cause, change in causes.items():
        health = Health(speaks=True)
        for step in range(PATIENCE):
            health.watch(step, WELL | {"update/grad_norm": 0.0} | change)
        assert cause in said(capsys)[0]


def test_a_step_in_which_no_mini_batch_had_anything_to_learn_has_no_gradient() -> None:
    values = {"update/tokens_in_update": 0.0}
    assert Health(speaks=False).watch(0, values) == {"health/no_gradient": 1}


def test_a_teacher_that_agrees_is_noticed_where_only_the_update_read_the_student_too() -> None:
    health = Health(speaks=False)
    for gap, shows in ((1e-8, 1), (0.5, 0)):
        found = health.watch(0, {"update/teacher/gap_max": gap})
        assert found == {"health/teacher_agrees": shows}


def test_what_a_method_does_not_measure_is_not_a_sign_and_other_ranks_are_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    health = Health(speaks=False)
    for step in range(PATIENCE):
        assert health.watch(step, {"rollout/truncated": 1.0}) == {"health/responses_cut": 1}
    health.sum_up()
    assert said(capsys) == []


def test_a_gradient_that_is_no_number_is_not_called_zero() -> None:
    values = json.loads('{"update/tokens_in_update": 5.0, "update/grad_norm": NaN}')
    assert Health(speaks=False).watch(0, values) == {"health/no_gradient": 0}
