#!/usr/bin/env python3
"""Stands in for the interpreter of a job: notes how it was started, and ends as it is told.

RECORD is a folder for the notes; BEHAVIOUR has a word for each start of the job: an exit code,
`wait` (until SIGUSR1 or SIGTERM, then 85), `hang` (until SIGKILL), `save,CODE` (leaves a checkpoint
first), `alone,CODE` (the other ranks hang), or `watched,CODE` (leaves the summary of a hang first).
PREFLIGHT has such words for the preflight: `0`, `hang`, or `wrong` (names the node of rank 0).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

RANK = int(os.environ["SLURM_PROCID"])
ATTEMPT = int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def behave(behaviour: str, run: Path) -> int:
    words = behaviour.split()
    *before, word = words[min(ATTEMPT, len(words) - 1)].split(",")
    if "save" in before:
        (run / "checkpoints" / f"step_{ATTEMPT:06d}").mkdir(parents=True, exist_ok=True)
    if "watched" in before:
        hang = run / "hangs" / f"rank-{RANK}"
        hang.mkdir(parents=True)
        (hang / "summary.txt").write_text("rank 1 is the first to be late\nin an all-reduce\n")
    if "alone" in before and RANK:
        word = "hang"
    if word == "wait":
        while not signal.sigpending() & {signal.SIGUSR1, signal.SIGTERM}:
            time.sleep(0.02)
        return 85
    while word == "hang":
        time.sleep(1)
    if word == "wrong":
        if RANK == 0:
            node = os.environ["SLURMD_NODENAME"]
            print(f"ok     all answer\nWRONG  node {node}: GPU 1: 3 uncorrected ECC errors")
        return 1
    return int(word)


def take_note(who: str) -> None:
    name = f"{os.environ['SLURM_JOB_ID']}-{ATTEMPT}-{who}-{RANK}.json"
    note = Path(os.environ["RECORD"], name)
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
    partial.rename(note)


def main() -> int:
    if "megasd.rollout.vllm.host" in sys.argv:
        take_note("engine")
        while True:
            time.sleep(1)
    if "doctor" in sys.argv:
        take_note("preflight")
        return behave(os.environ["PREFLIGHT"], Path(sys.argv[-1]))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    take_note("rank")
    config = Path(sys.argv[4])
    run = config.parents[2]
    code = behave(os.environ["BEHAVIOUR"], run)
    if RANK == 0:
        (run / "config.yaml").write_text(config.read_text())
    return code


if __name__ == "__main__":
    sys.exit(main())
