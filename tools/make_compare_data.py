"""Writes the data of configs/compare.yaml: `make_compare_data.py FOLDER [--seed N]`.

The task is the quickstart's with longer sums of larger numbers (see make_quickstart_data.py): four
to six terms of one or two digits, so that one wrong step in a chain of five spoils an answer and a
short training ends well below 1.

    sft.jsonl       in training order: worked solutions first, then mostly blurts. A hint, in two
                    prompts of five, is what some method's teacher may read: the answer, a worked
                    solution, or a blurt.
    rl.jsonl        plain prompts with answers and worked solutions
    heldout.jsonl   prompts whose expression is in neither of the other two (by its crc32);
                    the same for every seed
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from make_quickstart_data import (
    HINT,
    STRIDE,
    Item,
    items,
    judged_rows,
    run,
    worked,
    write_files,
)

OPTIONS = {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 2}
SFT_ROWS, RL_ROWS, HELD_OUT_ROWS = 1000 * 32, 2048, 256
WORKED_ONLY = 0.7  # share of the SFT rows before blurts begin
WORKED_LATER = 0.4
HINTED = 0.4
# Apart from each other, from the quickstart's, and from seed to seed by more than they are long.
SFT_SEED, RL_SEED, HELD_OUT_SEED = 3_000_000_000, 4_000_000_000, 800_000_000


def sft_rows(seed: int) -> Iterator[Item]:
    chance = random.Random(seed)
    stream = items(SFT_SEED + STRIDE * seed, held_out=False, options=OPTIONS)
    for number, item in enumerate(itertools.islice(stream, SFT_ROWS)):
        prompt, answer = item["question"], item["answer"]
        steps, blurt = worked(item["metadata"]["expression"]), f"#{answer}"
        if chance.random() < HINTED:
            prompt += HINT.replace("{context}", chance.choice((answer, answer, steps, blurt)))
        is_worked = number < WORKED_ONLY * SFT_ROWS or chance.random() < WORKED_LATER
        yield {"prompt": prompt, "answer": answer, "solution": steps if is_worked else blurt}


def write_compare_data(folder: Path, seed: int) -> None:
    rl = items(RL_SEED + STRIDE * seed, held_out=False, options=OPTIONS)
    held_out = items(HELD_OUT_SEED, held_out=True, options=OPTIONS)
    files = {
        "sft.jsonl": sft_rows(seed),
        "rl.jsonl": judged_rows(rl, RL_ROWS, options=OPTIONS),
        "heldout.jsonl": judged_rows(held_out, HELD_OUT_ROWS, options=OPTIONS),
    }
    write_files(folder, files)


if __name__ == "__main__":
    run(__doc__, write_compare_data)
