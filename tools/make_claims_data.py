"""Writes the data of tools/show_claims.py's recall task: `make_claims_data.py FOLDER [--seed N]`.

A prompt names a drawer ("Password of drawer K?"), whose password is five arbitrary letters: nobody
can work it out, and no two drawers of a set share one. So a policy that does not look at the name
is right on at most one prompt of the set, whatever it says, and a guess once in 26^5 times.

    sft.jsonl      drawers a to z, with a new password each time: half of the prompts carry it, as
                   the teacher will read it. A model that learns this knows the form of an answer,
                   can copy a password, and knows none.
    secrets.jsonl  drawers a to z again, no prompt with its password
    hard-N.jsonl   drawers A to Z, for each N below SETS with other passwords
"""

import random
import string
from pathlib import Path

from make_quickstart_data import run, write_files

HINT = " [answer: {context}]"  # `context.template` of configs/claims/recall.yaml
TAUGHT, HARD = string.ascii_lowercase, string.ascii_uppercase
SFT_ROWS, SECRET_ROWS, SETS = 500 * 32, 4096, 5
LETTERS = 5
HINTED = 0.5

Row = dict[str, str]


def question(drawer: str) -> str:
    return f"Password of drawer {drawer}?"


def password(chance: random.Random) -> str:
    return "".join(chance.choices(string.ascii_lowercase, k=LETTERS))


def taught_rows(chance: random.Random, count: int, *, hinted: float) -> list[Row]:
    """A share `hinted` of the prompts carries the password."""
    rows: list[Row] = []
    for _ in range(count):
        prompt, answer = question(chance.choice(TAUGHT)), password(chance)
        if chance.random() < hinted:
            prompt += HINT.replace("{context}", answer)
        rows.append(
            {"prompt": prompt, "answer": answer, "solution": f"#{answer}", "verifier": "exact"}
        )
    return rows


def hard_rows(chance: random.Random) -> list[Row]:
    passwords: list[str] = []
    while len(passwords) < len(HARD):
        one = password(chance)
        if one not in passwords:
            passwords.append(one)
    return [
        {"prompt": question(drawer), "answer": answer, "verifier": "exact"}
        for drawer, answer in zip(HARD, passwords, strict=True)
    ]


def write_recall_data(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    files = {
        "sft.jsonl": taught_rows(chance, SFT_ROWS, hinted=HINTED),
        "secrets.jsonl": taught_rows(chance, SECRET_ROWS, hinted=0.0),
        **{f"hard-{number}.jsonl": hard_rows(chance) for number in range(SETS)},
    }
    write_files(folder, files)


if __name__ == "__main__":
    run(__doc__, write_recall_data)
