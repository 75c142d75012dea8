"""Converts a distributed checkpoint of Megatron-core (torch_dist) to a Hugging Face folder.

    python tools/convert_megatron_to_hf.py Qwen3-8B-megatron Qwen3-8B-again
    python tools/convert_megatron_to_hf.py runs/math/checkpoints/step_000050 math-step-50

The checkpoint may be one that convert_hf_to_megatron.py wrote, one of a training run, or the
folder of a run (its newest). A conversion that was stopped goes on when the same command runs
again.
"""

import argparse
from pathlib import Path

from converting import (
    DTYPES,
    add_options,
    checkpoint_logits,
    compare_logits,
    folder_logits,
    memory_bytes,
    progress,
    run,
)

from megasd.weights.conversion import megatron_to_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="distributed checkpoint, or a run's folder")
    parser.add_argument("target", type=Path, help="folder to write; new, or empty")
    parser.add_argument(
        "--source",
        type=Path,
        help="Hugging Face folder that config, tokenizer and file names come from; default: what "
        "the checkpoint carries, or model.path of its run",
    )
    add_options(parser)
    args = parser.parse_args()
    run(lambda: convert(args))


def convert(args: argparse.Namespace) -> str:
    difference = None

    def check(folder: Path) -> None:
        nonlocal difference
        if args.verify_logits:
            difference = compare_logits(
                lambda: checkpoint_logits(args.checkpoint, args.source),
                lambda: folder_logits(folder),
                exact=args.dtype == "keep",
            )

    with progress("writing") as report:
        megatron_to_hf(
            args.checkpoint,
            args.target,
            source=args.source,
            dtype=DTYPES[args.dtype],
            memory_bytes=memory_bytes(args),
            report=report,
            check=check,
        )
    probed = "" if difference is None else f"; logits differ by at most {difference:g}"
    return f"{args.target}: complete and verified{probed}"


if __name__ == "__main__":
    main()
