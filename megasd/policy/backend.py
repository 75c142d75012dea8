"""Where the policy runs, cuda + nccl (+ Transformer Engine) or cpu + gloo: the one place to know.

`start` is called once, before anything imports megatron.core: on the CPU it prepares Megatron's
import (policy/megatron/cpu.py), on cuda it installs nothing.
"""

import importlib.util
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


@dataclass(frozen=True, slots=True)
class Backend:
    """A decision that holds for the life of the process."""

    device: torch.device
    collectives: str  # nccl, gloo
    transformer_engine: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


_started: Backend | None = None


def join_ranks(backend: Backend, *, timeout_seconds: int) -> None:
    """Initialise torch.distributed from the launcher: torchrun, srun, or nothing (one process).

    srun sets no RANK: its own variables are read, and MASTER_ADDR and MASTER_PORT must be set by
    the job script, for the launcher alone knows the first node's address.
    """
    timeout = timedelta(seconds=timeout_seconds)
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    if "RANK" not in environment:
        alone = HashStore()
        dist.init_process_group(
            backend.collectives, store=alone, rank=0, world_size=1, timeout=timeout
        )
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise ValueError(
            f"environment: RANK is set but not {', '.join(missing)}; start the ranks with "
            "torchrun, or set the first node's address and a free port in the job script"
        )
    dist.init_process_group(backend.collectives, timeout=timeout)


def start(device: str) -> Backend:
    """Choose `cuda`, `cpu` or `auto` (cuda when a GPU is visible) for this process, once."""
    global _started
    wanted = device
    if device == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"run.device: {device} was asked for, but torch {torch.__version__} sees no GPU; "
            "set run.device=cpu or start the job on a GPU node"
        )
    if _started is not None:
        if _started.device.type != wanted:
            raise ValueError(f"run.device: this process already runs on {_started.device.type}")
        return _started
    if wanted == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        # A task that sees its own GPU only has every rank's at index 0.
        gpu = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(gpu)
        has_transformer_engine = importlib.util.find_spec("transformer_engine") is not None
        _started = Backend(gpu, "nccl", has_transformer_engine)
    else:
        from megasd.policy.megatron import cpu

        cpu.prepare_megatron()
        _started = Backend(torch.device("cpu"), "gloo", False)
    # Megatron's own business, once per rank: nothing that a user could act on.
    for message in ("The .grad attribute of a Tensor", ".*tensor` is deprecated", ".*Apex is not"):
        warnings.filterwarnings("ignore", message=message)
    return _started
