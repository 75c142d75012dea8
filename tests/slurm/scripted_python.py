#!/usr/bin/env python3
"""Stands in for the interpreter of a job: notes how it was started, and ends as it is told.

RECORD is a folder for the notes; BEHAVIOUR has a word for each start of the job: an exit code,
`wait` (until SIGUSR1, then 85), `hang` (for ever), `save,CODE` (leaves a checkpoint first), or
`alone,CODE` (the other ranks hang).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def behave(words: list[str], attempt: int, run: Path) -> int:
    *before, word = words[min(attempt, len(words) - 1)].split(",")
    if "save" in before:
        (run / "checkpoints" / f"step_{attempt:06d}").mkdir(parents=True, exist_ok=True)
    if "alone" in before and os.environ["SLURM_PROCID"] != "0":
        word = "hang"
    if word == "wait":
        while signal.SIGUSR1 not in signal.sigpending():
            time.sleep(0.02)
        return 85
    while word == "hang":
        time.sleep(1)
    return int(word)


def main() -> int:
    environment = dict(os.environ)
    is_engine = "megasd.rollout.vllm_host" in sys.argv
    if not is_engine:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
    who = f"{'engine' if is_engine else 'rank'}-{environment['SLURM_PROCID']}"
    note = Path(environment["RECORD"]) / f"{environment['SLURM_JOB_ID']}-{attempt}-{who}.json"
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"arguments": sys.argv[1:], "environment": environment}))
    partial.rename(note)
    if is_engine:
        while True:
            time.sleep(1)
    config = Path(sys.argv[4])
    run = config.parents[2]
    code = behave(environment["BEHAVIOUR"].split(), attempt, run)
    if environment["SLURM_PROCID"] == "0":
        (run / "config.yaml").write_text(config.read_text())
    return code


if __name__ == "__main__":
    sys.exit(main())
