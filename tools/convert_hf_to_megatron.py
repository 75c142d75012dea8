"""Converts a Hugging Face folder to a distributed checkpoint of Megatron-core (torch_dist).

    python tools/convert_hf_to_megatron.py Qwen3-8B Qwen3-8B-megatron --tp 4 --pp 2

The layout decides how tensors are cut into files, one per model-parallel rank; every other layout
loads the result too. A conversion that was stopped goes on when the same command runs again.
"""

import argparse
from collections.abc import Callable
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

from megasd.weights.conversion import hf_to_megatron
from megasd.weights.layout import Sizes

OPTIONS = {
    "parallel.tensor": "--tp",
    "parallel.pipeline": "--pp",
    "parallel.expert": "--ep",
    "parallel.expert_tensor": "--etp",
    "model.path": "source",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="Hugging Face folder with safetensors weights")
    parser.add_argument("target", type=Path, help="folder to write; new, or empty")
    for name, what in (
        ("tp", "tensor-parallel ranks"),
        ("pp", "pipeline stages"),
        ("ep", "expert-parallel ranks"),
        ("etp", "tensor-parallel ranks of an expert"),
    ):
        parser.add_argument(f"--{name}", type=_positive, default=1, help=what)
    add_options(parser)
    args = parser.parse_args()
    run(lambda: in_options(lambda: convert(args)))


def in_options(work: Callable[[], str]) -> str:
    """Errors of the layout name the keys of a run's config: here they are options."""
    try:
        return work()
    except ValueError as error:
        text = str(error)
        for key, option in OPTIONS.items():
            text = text.replace(f"{key}:", f"{option}:")
        raise ValueError(text) from error


def convert(args: argparse.Namespace) -> str:
    difference = None

    def check(folder: Path) -> None:
        nonlocal difference
        if args.verify_logits:
            difference = compare_logits(
                lambda: folder_logits(args.source),
                lambda: checkpoint_logits(folder, None),
                exact=args.dtype == "keep",
            )

    with progress("writing") as report:
        hf_to_megatron(
            args.source,
            args.target,
            Sizes(tp=args.tp, pp=args.pp, ep=args.ep, etp=args.etp),
            dtype=DTYPES[args.dtype],
            memory_bytes=memory_bytes(args),
            report=report,
            check=check,
        )
    probed = "" if difference is None else f"; logits differ by at most {difference:g}"
    return f"{args.target}: complete and verified{probed}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    main()
