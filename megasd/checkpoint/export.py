"""The policy as a Hugging Face folder that transformers and vLLM load."""

import shutil
from pathlib import Path

import torch.distributed as dist

from megasd.policy.policy import Policy
from megasd.process import together
from megasd.process.errors import TryAgainError
from megasd.weights.bucket import named_tensors
from megasd.weights.hf_folder import write_hf_folder


def export_hf(policy: Policy, source: str | Path, target: Path, *, replace: bool) -> None:
    """Write the weights as they are; config and tokenizer come from `source`. Called by all ranks.

    `replace`: an existing `target` gives way once the new one is complete. Raises ValueError
    or TryAgainError on every rank when rank 0 cannot write; `target` is then as it was.
    """
    writes = dist.get_rank() == 0
    tensors = named_tensors(policy.weight_buckets(whole=True, takes=writes))
    failure = None
    if writes:
        try:
            new = target.with_name(f"{target.name}.new") if replace and target.exists() else target
            if new is not target:
                shutil.rmtree(new, ignore_errors=True)
            write_hf_folder(new, tensors, source)
            if new is not target:
                shutil.rmtree(target)
                new.rename(target)
        except (ValueError, TryAgainError) as error:
            failure = error
    for _ in tensors:  # the rest of a walk that all ranks take together
        pass
    failure = together.from_first_rank(failure)
    if failure is not None:
        raise failure
