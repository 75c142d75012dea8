"""Which releases of vLLM can be driven, and all that differs between them. Imports no vllm itself.

- 0.26 (torch 2.11) and 0.27 (torch 2.13): a transfer engine must have `trainer_send_weights`.
- 0.26, on a CPU: a batch with a greedy request in it ignores all seeds (vllm's
  `TopKTopPSampler.forward_cpu`), so those requests would not be answered alike twice. A call of
  the trainer's has one temperature, so it makes no such batch. GPUs heed every seed.
- 0.26, on a GPU: logits of dense models are divided by the temperature in bfloat16 (docs/sync.md).
- 0.28 to 0.32 (torch 2.13): no `trainer_send_weights`. The CPU tests run 0.32.
- 0.33 pins torch 2.14, beyond what pyproject.toml allows: megatron-core is not tried with it.

The signatures of what is called and subclassed are recorded in tests/unit/rollout/vllm_edges.json.
"""

import inspect
from typing import Any

import torch

# Below 0.26 there is no start and finish of an update.
SUPPORTED = ((0, 26), (0, 33))
LIFECYCLE = (
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
)


def probe() -> None:
    """Raises RuntimeError with one sentence when the vLLM of this process cannot be driven."""
    import vllm

    low, beyond = SUPPORTED
    numbers = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    wanted = f"vllm >= {low[0]}.{low[1]}, < {beyond[0]}.{beyond[1]}"
    if not low <= numbers < beyond:
        raise RuntimeError(f"vllm {vllm.__version__} is installed, megasd needs {wanted}")
    if differences := _differences(vllm):
        raise RuntimeError(
            f"vllm {vllm.__version__} has another weight-transfer interface than {wanted} "
            f"({'; '.join(differences)}): install a release of that range"
        )


def _differences(vllm: Any) -> list[str]:
    found = [f"LLM has no {name}" for name in LIFECYCLE if not hasattr(vllm.LLM, name)]
    try:
        from vllm.distributed.weight_transfer.base import WeightTransferEngine

        from megasd.rollout.vllm.receive import StreamedWeights
    except ImportError as error:
        return [*found, str(error)]
    given = inspect.signature(WeightTransferEngine.__init__).parameters
    wanted = ("vllm_config", "device", "model")
    found += [f"WeightTransferEngine takes no {name}" for name in wanted if name not in given]
    abstract = sorted(StreamedWeights.__abstractmethods__)
    return found + [f"megasd's engine lacks {name}, which is abstract" for name in abstract]


class NoTrainerSide:
    """What vLLM 0.26 and 0.27 want of a transfer engine beside its receiving end."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        raise RuntimeError(
            "megasd's trainer sends weights itself (megasd/rollout/vllm/send.py), not through vLLM"
        )


def drop_packed_experts(model: torch.nn.Module) -> None:
    """Lets the experts' CPU kernel be made again from the weights that come. All releases.

    vLLM packs the weights of experts only when the layer has no kernel yet; after a second load
    the kernel would read plain weights as packed ones: tokens are wrong, silently.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def repack_heads(model: torch.nn.Module) -> None:
    """Packs the head's weights for the CPU's kernel again. All releases.

    vLLM does so for a head that was loaded. One that is tied to the embedding is not: it would go
    on with the packed weights that it started with.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)
