"""What vLLM makes of an engine's options on eight H100s that are not there.

Its configuration for CUDA asks NVML and a few compiled modules, which answer here as on that
machine; everything else is vLLM's own. For a process of its own.
"""

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megasd.rollout.config import VLLMConfig
from megasd.rollout.vllm.options import engine_options
from megasd.weights.hf_folder import read_hf_config
from megasd.weights.tables import table_for

NVML: Mapping[str, Any] = {
    "nvmlInit": None,
    "nvmlShutdown": None,
    "nvmlDeviceGetCount": 8,
    "nvmlDeviceGetHandleByIndex": "a card",
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=80 << 30, free=79 << 30, used=1 << 30),
    "nvmlDeviceGetUUID": "GPU-0",
    "nvmlSystemGetDriverVersion": "580.95.05",
}


def pretend() -> None:
    """Before anything else of vLLM is imported: its platform is CUDA from here on."""
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "vllm_flash_attn._vllm_fa3_C"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    nvml = importlib.import_module("vllm.third_party.pynvml")
    for name, value in NVML.items():
        setattr(nvml, name, _answering(value))
    platforms = importlib.import_module("vllm.platforms")
    cuda = importlib.import_module("vllm.platforms.cuda").NvmlCudaPlatform
    cuda.is_cumem_allocator_available = _answering(True)
    cuda.device_count = classmethod(_answering(8))
    vars(platforms)["_current_platform"] = cuda()
    kernels = importlib.import_module("vllm._custom_ops")
    for name in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "group_gemm_supported"):
        setattr(kernels, f"cutlass_{name}", _answering(True))


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def configured(
    folders: Mapping[str, Path], engines: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Of each engine (its model, and `rollout.vllm`): what vLLM's configuration says."""
    pretend()
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    found = {}
    for name, (model, settings) in engines.items():
        options = engine_options(
            VLLMConfig(**settings),
            folders[model],
            dtype=torch.bfloat16,
            device=torch.device("cuda", 0),
            max_tokens=200,
            hf_shapes=table_for(read_hf_config(folders[model])).hf_shapes(),
        )
        arguments = EngineArgs(
            **options,
            worker_extension_cls="megasd.rollout.vllm.receive.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend="megasd"),
        )
        found[name] = _facts(arguments.create_engine_config())
    return found


def _facts(config: Any) -> dict[str, Any]:
    model, parallel, quantized = config.model_config, config.parallel_config, config.quant_config
    return {
        "device": config.device_config.device_type,
        "worker": parallel.worker_cls,
        "extension": parallel.worker_extension_cls,
        "transfer": config.weight_transfer_config.backend,
        "dtype": model.dtype,
        "length": model.max_model_len,
        "sleeps": model.enable_sleep_mode,
        "logprobs": model.logprobs_mode,
        "eager": model.enforce_eager,
        "load": config.load_config.load_format,
        "sequences": config.scheduler_config.max_num_seqs,
        "share": config.cache_config.gpu_memory_utilization,
        "cache": config.cache_config.kv_cache_memory_bytes,
        "tensor": (parallel.tensor_parallel_size, parallel.distributed_executor_backend),
        "expert_parallel": parallel.enable_expert_parallel,
        "experts": config.kernel_config.moe_backend,
        "quantization": model.quantization,
        "blocks": quantized and quantized.weight_block_size,
        "activations": quantized and quantized.activation_scheme,
        "not_quantized": quantized and sorted(quantized.ignored_layers),
        "graphs": config.compilation_config.cudagraph_mode.name,
    }
