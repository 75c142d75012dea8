"""Where the policy runs, cuda + nccl (+ Transformer Engine) or cpu + gloo: the one place to know.

`start` is called once, before anything imports megatron.core or touches CUDA: it sets what CUDA and
its libraries read from the environment, decides whose layers are used, and on the CPU prepares
Megatron's import (policy/megatron/cpu.py). docs/slurm.md has the variables and why they are set.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megasd.policy.config import Layers, Recipe

# Megatron waits for collectives of tensor parallelism behind matrix products that it meant to run
# beside them, unless the GPU has one queue for both.
TENSOR_PARALLEL = {"CUDA_DEVICE_MAX_CONNECTIONS": ("1",)}
# Of each: the values under which a run repeats itself; the first is set.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),  # Megatron's list
}
# Whether blockwise float8 scales are any float32, as vLLM's are; Transformer Engine reads it once.
BLOCK_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


@dataclass(frozen=True, slots=True)
class Backend:
    """A decision that holds for the life of the process."""

    device: torch.device
    collectives: str  # nccl, gloo
    transformer_engine: bool
    deterministic: bool = False  # kernels that add in a fixed order; on a CPU they all do

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


def device_type(device: str) -> str:
    """cuda or cpu, which `auto` means on this machine. Does not initialise CUDA."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.device_count() else "cpu"


def start(
    device: str,
    *,
    layers: Layers = "auto",
    tensor: int = 1,
    deterministic: bool = False,
    recipe: Recipe | None = None,
) -> Backend:
    """Choose `cuda`, `cpu` or `auto` (cuda when a GPU is visible) for this process, once.

    `layers`, `tensor`, `deterministic` and `recipe` are model.layers, parallel.tensor,
    run.deterministic and that of model.fp8. Raises ValueError, a sentence, for what cannot be had.
    """
    global _started
    wanted = device_type(device)
    if _started is not None:
        if _started.device.type != wanted:
            raise ValueError(f"run.device: this process already runs on {_started.device.type}")
        return _started
    if wanted == "cuda":
        _started = _start_cuda(device, layers, tensor, deterministic, recipe)
    else:
        _started = _start_cpu(layers, recipe)
    # Megatron's own business, once per rank: nothing that a user could act on.
    for message in (
        *("The .grad attribute of a Tensor", ".*tensor` is deprecated", ".*Apex is not"),
        *("fp8_autocast is deprecated", "The next bucket's parameter all-gather"),
    ):
        warnings.filterwarnings("ignore", message=message)
    return _started


def _start_cpu(layers: Layers, recipe: Recipe | None) -> Backend:
    from megasd.policy.megatron import cpu

    if recipe is not None:
        raise ValueError("model.fp8: float8 layers run on GPUs only; set it to null")
    if layers == "transformer_engine":
        raise ValueError(
            "model.layers: transformer_engine runs on GPUs only; set it to auto or local"
        )
    _hide("transformer_engine", "apex")  # their kernels want CUDA, and Megatron takes what it finds
    cpu.prepare_megatron()
    return Backend(torch.device("cpu"), "gloo", False)


def _start_cuda(
    device: str, layers: Layers, tensor: int, deterministic: bool, recipe: Recipe | None
) -> Backend:
    set_environment(os.environ, tensor=tensor, deterministic=deterministic)
    if not torch.cuda.is_available():
        raise ValueError(
            f"run.device: {device} was asked for, but torch {torch.__version__} can use none of "
            f"{torch.cuda.device_count()} GPUs; set run.device=cpu, start the job on a GPU node, "
            "or install the driver that torch's CUDA needs"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    # A task that sees its own GPU only has every rank's at index 0.
    gpu = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(gpu)
    # NVIDIA's containers let torch round float32 operands to TF32: routers, heads, losses.
    torch.set_float32_matmul_precision("highest")
    if deterministic:
        # What has no such kernel warns and runs; new memory need not be filled for it.
        torch.use_deterministic_algorithms(True, warn_only=True)
        fills: Any = torch.utils.deterministic
        fills.fill_uninitialized_memory = False
    if recipe == "blockwise":
        set_block_scales(os.environ, torch.cuda.get_device_capability(gpu))
    takes = _takes_transformer_engine(layers)
    if recipe is not None:
        _check_float8(recipe, takes_transformer_engine=takes)
    return Backend(gpu, "nccl", takes, deterministic)


def set_block_scales(environment: MutableMapping[str, str], capability: tuple[int, int]) -> None:
    """Where Transformer Engine can, scales of blocks as engines and FP8 checkpoints have them.

    From compute capability 10 on it takes the hardware's own blocks, whose scales are powers of 2.
    """
    wanted = "1" if capability < (10, 0) else "0"
    if environment.setdefault(BLOCK_SCALES, wanted) != "0" and wanted == "0":
        raise ValueError(
            f"model.fp8.recipe: blockwise has scales of powers of 2 on this GPU, and "
            f"{BLOCK_SCALES} in the environment asks for others; unset it"
        )


def _check_float8(recipe: Recipe, *, takes_transformer_engine: bool) -> None:
    if not takes_transformer_engine:
        raise ValueError(
            "model.fp8: float8 layers are Transformer Engine's, which is not installed or not "
            "taken (model.layers); install megasd's extra `gpu`, or set model.fp8 to null"
        )
    if fault := float8_fault(recipe):
        raise ValueError(
            f"model.fp8.recipe: {recipe} cannot run on this GPU ({fault.rstrip('.')}); choose "
            "another recipe, which `megasd doctor` names, or set model.fp8 to null"
        )


def float8_fault(recipe: Recipe) -> str | None:
    """Why this GPU or its CUDA cannot compute a recipe, in Transformer Engine's words."""
    engine = importlib.import_module("transformer_engine.pytorch")
    is_blockwise = recipe == "blockwise"
    ask = engine.is_fp8_block_scaling_available if is_blockwise else engine.is_fp8_available
    can, reason = ask(return_reason=True)
    return None if can else reason


def set_environment(
    environment: MutableMapping[str, str], *, tensor: int, deterministic: bool
) -> None:
    """Set what a run on CUDA wants where nothing is set; read when CUDA, cuBLAS, NCCL start.

    Raises ValueError where a variable contradicts `deterministic`.
    """
    wanted: Mapping[str, tuple[str, ...]] = TENSOR_PARALLEL if tensor > 1 else {}
    if deterministic:
        wanted = {**wanted, **DETERMINISTIC}
    for name, values in wanted.items():
        value = environment.setdefault(name, values[0])
        if name in DETERMINISTIC and value not in values:
            raise ValueError(
                f"run.deterministic: {name}={value} in the environment lets results differ; "
                f"unset it, or set it to {' or '.join(values)}"
            )


def _takes_transformer_engine(layers: Layers) -> bool:
    """Whether the layers are Transformer Engine's; where not, Megatron does not see it either."""
    if layers == "local":
        _hide("transformer_engine")
        return False
    if not is_transformer_engine_installed():
        if layers == "auto":
            return False
        raise ValueError(
            "model.layers: transformer_engine is not installed; install megasd's extra `gpu`, or "
            "set model.layers=local"
        )
    if cause := transformer_engine_fault():
        raise ValueError(
            f"model.layers: Transformer Engine is installed and cannot be imported ({cause}); "
            "mend its installation, or set model.layers=local"
        )
    return True


def is_transformer_engine_installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_fault() -> str | None:
    """Why the installed Transformer Engine cannot be imported; None: it can.

    Libraries that do not fit end in more than ImportError: OSError, RuntimeError, AssertionError.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        said = str(error).strip().splitlines()
        return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    return None


def _hide(*packages: str) -> None:
    """Whoever imports one of them from now on finds it not installed."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in packages:
            del sys.modules[name]
    for package in packages:
        sys.modules[package] = None  # pyright: ignore[reportArgumentType]
