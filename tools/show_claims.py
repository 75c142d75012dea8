"""Shows the papers' claims on tiny models, as far as they show: `show_claims.py CLAIM [--seeds N]`.

    hard-prompts  DistIL learns prompts whose every reward is 0, where GRPO's gradient is exactly 0
    opsd-stall    OPSD's divergence from its teacher stalls above 0; RLSD keeps the reward's sign
    rlrt-gate     RLRT-all, without the gate on correct rollouts, against RLRT
    dasd-routes   DASD against the constant routes +1 (attract) and -1 (repel)

Trains what is not there yet under runs/claims, one run after the other (tools/setup.sh makes the
model), then prints a table of means over seeds and writes every run's row to
runs/claims/CLAIM.json. Every figure comes from the runs' records, and nothing is judged here:
docs/methods.md says what shows and what does not.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import make_claims_data
import make_compare_data
from make_quickstart_data import write_files

from megasd.configuration.load import Config, differing_keys, load_config, read_config
from megasd.evaluation.records import read_counts
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.metrics.run_folder import CONFIG_FILE

FOLDER = Path("runs/claims")
RECALL_DATA = FOLDER / "recall-data"
LONG_SUMS_DATA = Path("runs/compare-inputs")  # as configs/compare.yaml names it
POOL = 64  # responses of each prompt at the warm start: with a success among them it is not hard
WINDOW = 5  # steps that are averaged where a curve's ends and its minimum are read
QUIET = ("metrics.console=false", "checkpoint.every=0", "checkpoint.export_hf=false")

Table = list[dict[str, Any]]  # rows of one shape


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        sys.exit(train_and_count_signs(sys.argv[1:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, from seed 0 on")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be 1 or more")
    table = CLAIMS[arguments.claim](range(arguments.seeds))
    print_summary(table)
    path = FOLDER / f"{arguments.claim}.json"
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(path)


# Runs


def trained(name: str, config: str, *overrides: str, count_signs: bool = False) -> Path:
    """The folder of the run, which is trained unless it is there; its log lies beside it."""
    items = [*overrides, f"run.directory={FOLDER}", f"run.name={name}"]
    wanted, folder = load_config(config, items), FOLDER / name
    if (folder / CONFIG_FILE).is_file():
        saved = read_config(folder / CONFIG_FILE).config
        keys = differing_keys(saved, wanted) if saved else ["keys of another version"]
        if keys:
            raise SystemExit(f"{folder} holds another run ({', '.join(keys)}); remove that folder")
        if is_complete(folder, wanted):
            return folder
        shutil.rmtree(folder)
    print(f"training {folder}", flush=True)
    program = [str(Path(__file__))] if count_signs else ["-m", "megasd.cli"]
    log = FOLDER / f"{name}.log"
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, *program, "train", config, *items],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # with more, sums round differently
            check=False,
        )
    if done.returncode != 0:
        raise SystemExit(f"{folder} failed with exit code {done.returncode}; see {log}")
    return folder


def is_complete(folder: Path, config: Config) -> bool:
    """True if it got to its last evaluation or, where it has none, to its last checkpoint."""
    steps = config.run.steps
    if config.evaluation.files:
        return any(row["step"] == steps for row in read_rows(folder / METRICS_FILE))
    saved = folder / "checkpoints" / f"step_{steps:06d}"
    return saved.is_dir() and (folder / "hf").is_dir() == config.checkpoint.export_hf


def train_and_count_signs(arguments: Sequence[str]) -> int:
    """`megasd train` with one more metric for RLSD and DASD.

    credit/sign_kept: the share of response tokens whose credit has the sign of their advantage A.
    """
    from megasd.algorithms.dasd import DASD
    from megasd.algorithms.rlsd import RLSD
    from megasd.cli import main as megasd
    from megasd.losses.credit import per_token
    from megasd.types import Credit, ResponseBatch

    def count(method: type[RLSD] | type[DASD]) -> None:
        assign_credit: Callable[..., Credit] = method.assign_credit

        def counted(self: RLSD | DASD, batch: ResponseBatch, step: int) -> Credit:
            credit = assign_credit(self, batch, step)
            advantages = per_token(self.advantages(batch), batch.rollout_ids)
            is_kept = (credit.advantages.sign() == advantages.sign())[batch.response_mask]
            share = is_kept.double().mean().item()
            return credit._replace(metrics={**credit.metrics, "sign_kept": share})

        method.assign_credit = counted

    count(RLSD)
    count(DASD)
    return megasd(arguments)


def values(run: Path, key: str) -> list[float]:
    """What the run logged under `key`, in the order of its steps."""
    return [row[key] for row in read_rows(run / METRICS_FILE) if row.get(key) is not None]


def before_and_after(run: Path) -> dict[str, float]:
    accuracies = values(run, "evaluation/accuracy")
    return {"accuracy before": accuracies[0], "after": accuracies[-1]}


# Claims


def hard_prompts(seeds: Sequence[int]) -> Table:
    """Each seed has passwords of its own; a policy blind to the prompt gets 1 / prompts at most."""
    start = recall_warm_start()
    variants = {
        "distil": ["algorithm.name=distil"],
        "distil, no future credit": ["algorithm.name=distil", "algorithm.future_credit=false"],
        "distil, ema teacher": ["algorithm.name=distil", "teacher.weights=ema"],
        "grpo": ["algorithm.name=grpo"],
    }
    table: Table = []
    for seed in seeds:
        prompts, num_dropped = without_success(start, seed)
        for method, items in variants.items():
            run = trained(
                f"hard-{method.replace(', ', '-').replace(' ', '-')}-{seed}",
                "configs/claims/recall.yaml",
                *(*items, *QUIET, *recall_items(start, prompts, seed)),
            )
            table.append({"method": method, "seed": seed, **hard_row(run, num_dropped)})
    return table


def hard_row(run: Path, num_dropped: int) -> dict[str, Any]:
    """DistIL asks for no rewards, so that its runs do not know when they first succeeded."""
    norms, rewards = values(run, "update/grad_norm"), values(run, "reward/accuracy")
    accuracies = values(run, "evaluation/accuracy")
    counts = read_counts(run, len(norms))
    return {
        "prompts": len(counts.right),
        "dropped": num_dropped,
        "guess at most": 1 / len(counts.right),
        "accuracy before": accuracies[0],
        "halfway": accuracies[len(accuracies) // 2],
        "after": accuracies[-1],
        "prompts right at all": sum(right > 0 for right in counts.right),
        "steps": len(norms),
        "with a success": sum(reward > 0 for reward in rewards) if rewards else None,
        "with gradient 0": sum(norm == 0.0 for norm in norms),
    }


def recall_items(start: Path, prompts: Path, seed: int) -> list[str]:
    files = [f"data.files=[{prompts}]", f"evaluation.files=[{prompts}]"]
    return [f"model.path={start}", f"run.seed={seed}", *files]


def without_success(start: Path, seed: int) -> tuple[Path, int]:
    """The prompts that the warm start got right in none of `POOL` responses; how many it did."""
    folder = RECALL_DATA
    candidates = folder / f"hard-{seed}.jsonl"
    if not candidates.is_file():
        raise SystemExit(f"{folder} has sets for {make_claims_data.SETS} seeds; ask for fewer")
    pool = trained(
        f"hard-pool-{seed}",
        "configs/claims/recall.yaml",
        *("algorithm.name=grpo", "run.steps=1", "optimizer.warmup_steps=0"),
        *("evaluation.every=0", f"evaluation.samples={POOL}"),
        *(*QUIET, *recall_items(start, candidates, seed)),
    )
    right = read_counts(pool, 0).right
    rows = [json.loads(line) for line in candidates.read_text(encoding="utf-8").splitlines()]
    kept = [row for row, successes in zip(rows, right, strict=True) if successes == 0]
    name = f"kept-{seed}.jsonl"
    write_files(folder, {name: kept})
    return folder / name, len(rows) - len(kept)


def recall_warm_start() -> Path:
    if not (RECALL_DATA / "sft.jsonl").is_file():
        make_claims_data.write_recall_data(RECALL_DATA, seed=0)
    return trained("recall-sft", "configs/claims/recall_sft.yaml") / "hf"


def opsd_stall(seeds: Sequence[int]) -> Table:
    """On sums, whose hidden answer can be worked out, and on passwords that change every time."""
    sums = f"model.path={trained('sums-sft', 'configs/quickstart_sft.yaml') / 'hf'}"
    opsd, live, frozen = "algorithm.name=opsd", "teacher.weights=live", "teacher.weights=frozen"
    secrets = [
        *(opsd, "algorithm.divergence.kind=forward_kl", f"model.path={recall_warm_start()}"),
        *(f"data.files=[{RECALL_DATA / 'secrets.jsonl'}]", "evaluation.files=[]"),
    ]
    variants = {
        "sums-opsd-live": [opsd, live, sums],
        "sums-opsd-frozen": [opsd, frozen, sums],
        "sums-rlsd-snapshot": ["algorithm.name=rlsd", "teacher.weights=snapshot", sums],
        "secrets-opsd-frozen": [*secrets, frozen],
        "secrets-opsd-live-slow": [*secrets, live, "optimizer.lr=2e-4"],
        "secrets-opsd-live": [*secrets, live],  # at the 2e-3 of recall.yaml
    }
    table: Table = []
    for variant, items in variants.items():
        is_secret = variant.startswith("secrets")
        config = "configs/claims/recall.yaml" if is_secret else "configs/quickstart.yaml"
        for seed in seeds:
            run = trained(
                f"stall-{variant}-{seed}",
                config,
                *(*items, *QUIET, "run.steps=100", f"run.seed={seed}"),
                count_signs="rlsd" in variant,
            )
            table.append({"run": variant, "seed": seed, **stall_row(run, is_secret)})
    return table


def stall_row(run: Path, is_secret: bool) -> dict[str, Any]:
    """Divergences in nats a token, over `WINDOW` steps; log-prob gaps tell if the teacher reads.

    `floor` is the forward KL from a teacher that is sure of the password to a student that knows
    nothing of it: log 26 at each letter, 0 at the "#" and at the end.
    """
    divergences = [statistics.fmean(part) for part in windows(values(run, "update/divergence"))]
    letters = make_claims_data.LETTERS
    return {
        "start": divergences[0] if divergences else None,
        "lowest": min(divergences, default=None),
        "end": divergences[-1] if divergences else None,
        "floor": letters * math.log(26) / (letters + 2) if is_secret else None,
        "teacher gap, end": statistics.fmean(values(run, "teacher/gap_mean")[-WINDOW:]),
        "sign kept, least": min(values(run, "credit/sign_kept"), default=None),
        **({} if is_secret else before_and_after(run)),
    }


def windows(numbers: Sequence[float]) -> Iterator[Sequence[float]]:
    return (numbers[end - WINDOW : end] for end in range(WINDOW, len(numbers) + 1))


STRONG = "optimizer.lr=5e-4"  # five times configs/compare.yaml's


def rlrt_gate(seeds: Sequence[int]) -> Table:
    """As the paper weighs it, and again where the teacher decides more and steps are larger."""
    rlrt, rlrt_all = "algorithm.name=rlrt", "algorithm.gate=all"
    strong = [STRONG, "algorithm.mix=0.9"]
    return on_long_sums(
        seeds,
        {
            "grpo": ["algorithm.name=grpo"],
            "rlrt": [rlrt],
            "rlrt-all": [rlrt, rlrt_all],
            "grpo-strong": ["algorithm.name=grpo", STRONG],
            "rlrt-strong": [rlrt, *strong],
            "rlrt-all-strong": [rlrt, rlrt_all, *strong],
        },
    )


def dasd_routes(seeds: Sequence[int]) -> Table:
    """With the default beta 0.1, and again with 0.5 and larger steps."""
    dasd, attract, repel = "algorithm.name=dasd", "algorithm.route=attract", "algorithm.route=repel"
    strong = [STRONG, "algorithm.beta=0.5"]
    return on_long_sums(
        seeds,
        {
            "grpo": ["algorithm.name=grpo"],
            "dasd": [dasd],
            "dasd-attract": [dasd, attract],
            "dasd-repel": [dasd, repel],
            "grpo-strong": ["algorithm.name=grpo", STRONG],
            "dasd-strong": [dasd, *strong],
            "dasd-attract-strong": [dasd, attract, *strong],
            "dasd-repel-strong": [dasd, repel, *strong],
        },
    )


def on_long_sums(seeds: Sequence[int], variants: dict[str, list[str]]) -> Table:
    """Held-out accuracy of each variant after the training of configs/compare.yaml."""
    if not (LONG_SUMS_DATA / "rl.jsonl").is_file():
        make_compare_data.write_compare_data(LONG_SUMS_DATA, seed=0)
    start = trained("long-sums-sft", "configs/compare_sft.yaml") / "hf"
    table: Table = []
    for method, items in variants.items():
        for seed in seeds:
            run = trained(
                f"long-sums-{method}-{seed}",
                "configs/compare.yaml",
                *(*items, *QUIET, f"model.path={start}", f"run.seed={seed}"),
                count_signs=method.startswith("dasd"),
            )
            row = {"method": method, "seed": seed, **before_and_after(run)}
            row["entropy, last steps"] = statistics.fmean(values(run, "update/entropy")[-WINDOW:])
            row["tokens, last steps"] = statistics.fmean(
                values(run, "rollout/response_length")[-WINDOW:]
            )
            signs = values(run, "credit/sign_kept")
            table.append({**row, "sign kept": statistics.fmean(signs) if signs else None})
    return table


CLAIMS: dict[str, Callable[[Sequence[int]], Table]] = {
    "hard-prompts": hard_prompts,
    "opsd-stall": opsd_stall,
    "rlrt-gate": rlrt_gate,
    "dasd-routes": dasd_routes,
}


def print_summary(table: Table) -> None:
    """Markdown: a row for each kind of run, the mean over its seeds and from where to where."""
    kind, *keys = [
        key for key in dict.fromkeys(key for row in table for key in row) if key != "seed"
    ]
    print("| " + " | ".join([kind, *keys]) + " |")
    print("|" + "---|" * (len(keys) + 1))
    for name in dict.fromkeys(row[kind] for row in table):
        rows = [row for row in table if row[kind] == name]
        print(
            "| "
            + " | ".join([name, *(cell([row.get(key) for row in rows]) for key in keys)])
            + " |"
        )


def cell(numbers: Sequence[float | None]) -> str:
    found = [number for number in numbers if number is not None]
    if not found:
        return ""
    if min(found) == max(found):
        return f"{found[0]:.4g}"
    return f"{statistics.fmean(found):.3f} ({min(found):.3g} to {max(found):.3g})"


if __name__ == "__main__":
    main()
