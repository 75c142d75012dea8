import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megasd.rewards.config import RewardConfig
from megasd.rewards.scorer import Scorer
from megasd.types import Prompt, Rollout, Verdict
from tests.unit import strange_verifiers

STRANGE = "tests.unit.strange_verifiers:"


def rollout(verifier: str, text: str, answer: str | None = None, **metadata) -> Rollout:
    prompt = Prompt(
        index=0,
        messages=({"role": "user", "content": "?"},),
        token_ids=np.zeros(1, dtype=np.int64),
        answer=answer,
        verifier=verifier,
        metadata=metadata,
    )
    return Rollout(
        prompt=prompt,
        group_id=0,
        sample=0,
        token_ids=np.zeros(1, dtype=np.int64),
        logprobs=None,
        text=text,
        finish_reason="stop",
        policy_version=0,
    )


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(RewardConfig(workers=2, timeout_seconds=2.0)) as scorer:
        yield scorer


def test_a_verifier_that_misbehaves_costs_its_own_rollout_and_no_other(scorer):
    bad = {
        "sleeps": "longer than 2 s",
        "hangs_in_c": "longer than 2 s",
        "kills_itself": "exit code 3",
        "segfaults": "exit code -11",
        "exits": "SystemExit: enough",
        "raises": "KeyError: 'no such test case' (" + strange_verifiers.__file__ + ":",
        "raises_unpicklable": "UnpicklableError: two arguments",
        "returns_nan": "reward nan",
        "returns_nothing": "TypeError",
    }
    batch = []
    for index, name in enumerate(bad):
        batch += [rollout(STRANGE + "length", "x" * index), rollout(STRANGE + name, "")]
        batch += [rollout("exact", "7", "7")]
    verdicts = scorer.score(batch)
    good = [Verdict(reward=float(i), feedback=f"{i} characters") for i in range(len(bad))]
    assert verdicts[0::3] == good
    for verdict, reason in zip(verdicts[1::3], bad.values(), strict=True):
        assert reason in str(verdict.error)
    assert verdicts[2::3] == [Verdict(reward=1.0, feedback="correct")] * len(bad)
    assert scorer.score(batch[:1]) == good[:1]  # and the pool goes on


def test_metadata_that_cannot_travel_is_that_rollouts_error(scorer):
    batch = [rollout(STRANGE + "half", "", stuck=lambda: 0), rollout(STRANGE + "half", "")]
    stuck, fine = scorer.score(batch)
    assert "pickle" in str(stuck.error).lower()
    assert fine == Verdict(reward=0.5)


def test_workers_that_die_while_idle_are_replaced(scorer):
    batch = [rollout(STRANGE + "process_id", "")] * 40
    for process in {int(verdict.reward) for verdict in scorer.score(batch)}:
        os.kill(process, signal.SIGKILL)
    time.sleep(0.3)  # the pool notices
    assert [verdict.error for verdict in scorer.score(batch)] == [None] * 40


def test_workers_do_not_import_torch(scorer):
    assert scorer.score([rollout(STRANGE + "has_torch", "")]) == [Verdict(reward=0.0)]


def test_math_verify_and_reasoning_gym_work_in_the_workers(scorer):
    entry = {"question": "1 + 2", "answer": "3", "metadata": {}}
    row = {"task": "chain_sum", "options": {}, "entry": entry}
    batch = [
        rollout("math", r"\boxed{0.5}", r"\frac{1}{2}"),
        rollout("math", "I give up", "2"),
        rollout("math", "7", r"\text{}"),
        rollout("reasoning_gym", "<answer>3</answer>", "3", **row),
    ]
    right, silent, unreadable, gym = scorer.score(batch)
    assert right.reward == gym.reward == 1.0
    assert silent.reward == 0.0
    assert "no answer found" in silent.feedback
    assert "cannot read the row's answer" in str(unreadable.error)


SQUARES = [{"entry_point": "square", "args": [n], "expected": n * n} for n in (1, 2, 3)]
HALF_RIGHT = "```python\ndef square(n):\n    return n * n if n < 3 else 0\n```"


def test_programs_are_judged_in_the_workers_and_binary_rounds_partial_credit_down():
    batch = [rollout("code", HALF_RIGHT, tests=SQUARES), rollout("code", "1 +", tests=SQUARES)]
    for binary, reward in ((False, 2 / 3), (True, 0.0)):
        with Scorer(RewardConfig(workers=2, binary=binary)) as scorer:
            partly, broken = scorer.score(batch)
        assert (partly.error, partly.reward) == (None, reward)
        assert "Test 3 failed.\nInput: square(3)\nExpected: 9\nGot: 0" in partly.feedback
        assert (broken.error, broken.reward) == (None, 0.0)


def test_a_program_dies_with_the_worker_that_is_killed_for_it():
    endless = rollout("code", "while True: pass", tests=SQUARES, seconds=60, seconds_per_test=60)
    with Scorer(RewardConfig(workers=1, timeout_seconds=1.0)) as scorer:
        (verdict,) = scorer.score([endless])
        assert "longer than 1 s" in str(verdict.error)
        wait_until(lambda: not sandboxes(), seconds=5.0)


def sandboxes() -> list[str]:
    """Processes of sandboxes that run a program for 60 s of processor time, this test's alone."""
    found = []
    for limits in Path("/proc").glob("[0-9]*/limits"):
        try:
            seconds = re.search(r"Max cpu time +(\d+)", limits.read_text())
        except OSError:
            continue
        if seconds and seconds[1] == "61":
            found.append(limits.parent.name)
    return found


def test_binary_rewards_follow_the_success_threshold():
    batch = [rollout(STRANGE + "half", ""), rollout("exact", "7", "7"), rollout("exact", "8", "7")]
    for threshold, expected in [(0.5, [1.0, 1.0, 0.0]), (0.6, [0.0, 1.0, 0.0])]:
        config = RewardConfig(workers=1, binary=True, success_threshold=threshold)
        with Scorer(config) as scorer:
            assert [verdict.reward for verdict in scorer.score(batch)] == expected


def test_a_pattern_that_never_ends_is_killed_too():
    config = RewardConfig(workers=1, timeout_seconds=0.5)
    with Scorer(config, answer_pattern=r"#((a+)+)$") as scorer:
        hung, fine = scorer.score(
            [rollout("exact", "#" + "a" * 60 + "b", "a"), rollout("exact", "#a", "a")]
        )
    assert "longer than 0.5 s" in str(hung.error)
    assert fine.reward == 1.0


@pytest.mark.parametrize(
    ("config", "pattern", "key"),
    [
        (RewardConfig(workers=0), None, "reward.workers"),
        (RewardConfig(timeout_seconds=0), None, "reward.timeout_seconds"),
        (RewardConfig(), r"#\d", "data.answer_pattern"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, pattern, key):
    with pytest.raises(ValueError, match=key):
        Scorer(config, pattern)


def test_a_worker_dies_with_its_parent_even_in_the_middle_of_a_hang(tmp_path: Path):
    note = tmp_path / "worker"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import multiprocessing, os, sys\n"
            "from pebble import ProcessPool\n"
            "from megasd.rewards import worker\n"
            f"name = '{STRANGE}writes_process_id_and_hangs'\n"
            "context = multiprocessing.get_context('spawn')\n"
            "pool = ProcessPool(1, 0, worker.start, (os.getpid(), [name]), context)\n"
            "pool.schedule(worker.judge, args=(name, sys.argv[1], None, {}, None)).result()\n",
            str(note),
        ],
        cwd=Path(__file__).parents[3],
    )
    wait_until(lambda: note.is_file() and note.read_text() != "")
    process = int(note.read_text())
    assert running(process)
    parent.kill()
    parent.wait()
    wait_until(lambda: not running(process))


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie is dead: whoever adopted it has not looked yet


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
