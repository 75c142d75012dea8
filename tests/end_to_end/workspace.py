"""A model, data and a config so small that a whole run takes seconds."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasd.cli import main
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.testing.forked import Forked, complete, start_ranks
from megasd.testing.tiny import tiny_qwen3

CONFIG = """
run: {{name: {name}, directory: {folder}, steps: {steps}}}
model: {{path: {folder}/model, dtype: float32}}
data: {{files: [{folder}/train.jsonl], verifier: "{verifier}", max_prompt_tokens: 32}}
context: {{sources: [answer], template: " [answer: {{context}}]"}}
teacher: {{weights: ema, decay: 0.8}}
algorithm: {{name: rlsd}}
reward: {{workers: 1}}
rollout: {{prompts_per_step: 4, group_size: 4, max_response_tokens: 6}}
optimizer: {{lr: 1e-3, schedule: cosine, warmup_steps: 2, minibatches_per_step: 2}}
checkpoint: {{every: {every}, export_hf: true}}
metrics: {{wandb: "off"}}
evaluation: {{files: [{folder}/held_out.jsonl], every: 4, samples: 2}}
"""
VERIFIER = "tests.end_to_end.verifiers:share_of_digits"


def make(folder: Path, **sizes: Any) -> Path:
    tiny_qwen3(folder / "model", norm_spread=0.1, **sizes)
    for name, count in (("train.jsonl", 11), ("held_out.jsonl", 5)):
        rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, name: str, *, steps: int = 12, every: int = 2) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        CONFIG.format(name=name, folder=folder, steps=steps, every=every, verifier=VERIFIER)
    )
    return path


def command(*arguments: str | Path, ranks: int = 1) -> list[str]:
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launch, "-m", "megasd.cli", *map(str, arguments)]


def train(*arguments: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return complete(start("train", *arguments, ranks=ranks))


def start(*arguments: str | Path, ranks: int = 1) -> list[Forked]:
    return start_ranks(run_megasd, *map(str, arguments), ranks=ranks)


def run_megasd(*arguments: str) -> int:
    """What `python -m megasd.cli` does with these arguments, in this process."""
    sys.argv = ["megasd", *arguments]
    return main(arguments)


def torchrun(*arguments: str | Path, ranks: int) -> subprocess.CompletedProcess[str]:
    """As a user starts it: by torchrun, each process with its imports before it."""
    return subprocess.run(
        command("train", *arguments, ranks=ranks), capture_output=True, text=True, check=False
    )


def untimed_rows(run: Path) -> Sequence[dict]:
    """metrics.jsonl without what no two runs share: seconds, speeds, what became of engines."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "engine/"))}
        for row in read_rows(run / METRICS_FILE)
    ]
