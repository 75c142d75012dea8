"""What the conversion tools share: errors as sentences, the progress bar, the probe of logits."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor

from megasd.weights.conversion import Report, open_checkpoint, parts_of
from megasd.weights.hf_folder import read_hf_config
from megasd.weights.tables import table_for

DTYPES = {"keep": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
PROBE_TOKENS = 48


def run(work: Callable[[], str]) -> None:
    """Prints what `work` returns; what is wrong ends as one sentence and exit code 2."""
    try:
        print(work())
    except (ValueError, OSError, RuntimeError) as error:  # torch has no memory: RuntimeError
        sys.exit(_sentence(f"error: {error}"))
    except MemoryError:
        sys.exit(_sentence("error: out of memory; give --memory-gib to be told what it takes"))
    except KeyboardInterrupt:
        sys.exit(
            _sentence("interrupted; the same command goes on with the files that are complete")
        )


def _sentence(text: str) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both directions."""
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the target's tensors")
    parser.add_argument(
        "--memory-gib", type=float, help="refuse to start if more memory than this would be needed"
    )
    parser.add_argument(
        "--verify-logits", action="store_true", help="compare both models on fixed token ids"
    )


def memory_bytes(args: argparse.Namespace) -> int | None:
    return None if args.memory_gib is None else int(args.memory_gib * 2**30)


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar on stderr while something is written; nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, advance=done, total=total)


def compare_logits(one: Callable[[], Tensor], other: Callable[[], Tensor], *, exact: bool) -> float:
    """The largest difference; raises ValueError when there is one although `exact`, or a NaN."""
    try:
        difference = (one() - other()).abs().max().item()
    except OSError as error:  # transformers raises it for what it misses in a folder
        raise ValueError(f"--verify-logits: transformers does not load it ({error})") from error
    if difference != difference or (exact and difference > 0):
        raise ValueError(
            f"the converted model answers differently (logits by up to {difference:g}); nothing "
            "was written: report this with the model's config.json"
        )
    return difference


def folder_logits(folder: Path) -> Tensor:
    """Logits [tokens, vocabulary] of the probe, in float32, from a Hugging Face folder."""
    _quiet()
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def checkpoint_logits(checkpoint: Path, source: Path | None) -> Tensor:
    """The same from a distributed checkpoint: its tensors read as Hugging Face's."""
    _quiet()
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    dist, model_files = open_checkpoint(checkpoint, source)
    table = table_for(read_hf_config(model_files))
    dist.check(table)
    tensors = {name: part.tensor() for name, part in parts_of(dist, table).items()}
    config = AutoConfig.from_pretrained(model_files)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32
    )
    return _logits(model)


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    vocabulary: int = model.config.vocab_size  # pyright: ignore
    ids = torch.arange(1, PROBE_TOKENS + 1) * 7919 % vocabulary  # a prime: all over the vocabulary
    return model.eval()(ids[None]).logits[0]


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
