"""Writes the quickstart's data: `make_quickstart_data.py FOLDER [--seed N]`.

The task is reasoning-gym's chain_sum: sums of three or four digits whose running totals never
fall below 0. A solution is either worked ("7+5=12;12-9=3;#3") or a blurt ("#3").

    sft.jsonl       in training order: worked solutions first, then mostly blurts, so that the
                    model can work a sum out but rarely does. Two prompts in five carry the answer,
                    as the teacher will read it: a teacher that never saw a hint is none.
    rl.jsonl        plain prompts with their answers
    heldout.jsonl   prompts whose expression is in neither of the other two (by its crc32);
                    the same for every seed
"""

import argparse
import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import reasoning_gym

TASK = "chain_sum"
OPTIONS = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
HINT = " [answer: {context}]"  # `context.template` of configs/quickstart.yaml
SFT_ROWS, RL_ROWS, HELD_OUT_ROWS = 1100 * 32, 1024, 256
WORKED_ONLY = 0.6  # share of the SFT rows before blurts begin
WORKED_LATER = 0.3
HINTED = 0.4
# reasoning-gym draws item i from seed + i: streams must lie further apart than they are long.
SFT_SEED, RL_SEED, HELD_OUT_SEED, STRIDE = 1_000_000_000, 2_000_000_000, 900_000_000, 1_000_000

Item = dict[str, Any]


def running_totals(expression: str) -> list[int]:
    """The partial sums of "7 + 5 - 9": 7, 12, 3."""
    first, *rest = expression.split()
    signs = {"+": 1, "-": -1}
    steps = [signs[sign] * int(term) for sign, term in zip(rest[::2], rest[1::2], strict=True)]
    return list(itertools.accumulate([int(first), *steps]))


def worked(expression: str) -> str:
    """The solution with every step: "7+5=12;12-9=3;#3"."""
    _, *rest = expression.split()
    totals = running_totals(expression)
    pairs = zip(itertools.pairwise(totals), rest[::2], rest[1::2], strict=True)
    steps = [f"{before}{sign}{term}={after};" for (before, after), sign, term in pairs]
    return "".join(steps) + f"#{totals[-1]}"


def is_held_out(expression: str) -> bool:
    return zlib.crc32(expression.encode()) % 10 == 0


def items(seed: int, *, held_out: bool, options: Mapping[str, int] = OPTIONS) -> Iterator[Item]:
    """Items of the task without end, in an order that the seed decides."""
    dataset = reasoning_gym.create_dataset(TASK, seed=seed, size=STRIDE, **options)
    for item in dataset:
        expression = item["metadata"]["expression"]
        if is_held_out(expression) == held_out and min(running_totals(expression)) >= 0:
            yield item


def sft_rows(seed: int) -> Iterator[Item]:
    chance = random.Random(seed)
    stream = items(SFT_SEED + STRIDE * seed, held_out=False)
    for number, item in enumerate(itertools.islice(stream, SFT_ROWS)):
        prompt = item["question"]
        if chance.random() < HINTED:
            prompt += HINT.replace("{context}", item["answer"])
        is_worked = number < WORKED_ONLY * SFT_ROWS or chance.random() < WORKED_LATER
        solution = worked(item["metadata"]["expression"]) if is_worked else f"#{item['answer']}"
        yield {"prompt": prompt, "answer": item["answer"], "solution": solution}


def judged_rows(
    stream: Iterator[Item], count: int, options: Mapping[str, int] = OPTIONS
) -> Iterator[Item]:
    """`count` different prompts with what reasoning-gym's own scorer needs."""
    seen: set[str] = set()
    for item in stream:
        if len(seen) == count:
            return
        if item["question"] not in seen:
            seen.add(item["question"])
            yield {
                "prompt": item["question"],
                "answer": item["answer"],
                "solution": worked(item["metadata"]["expression"]),
                "verifier": "reasoning_gym",
                "metadata": {"task": TASK, "options": options, "entry": item},
            }


def write_quickstart_data(folder: Path, seed: int) -> None:
    rl = items(RL_SEED + STRIDE * seed, held_out=False)
    held_out = items(HELD_OUT_SEED, held_out=True)
    files = {
        "sft.jsonl": sft_rows(seed),
        "rl.jsonl": judged_rows(rl, RL_ROWS),
        "heldout.jsonl": judged_rows(held_out, HELD_OUT_ROWS),
    }
    write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, Iterable[Item]]) -> None:
    """Rows as JSON Lines, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def run(description: str | None, write: Callable[[Path, int], None]) -> None:
    """The command line of a script that writes a folder from a seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.seed)


if __name__ == "__main__":
    run(__doc__, write_quickstart_data)
