"""The worker's side of an update: vLLM's weight-transfer lifecycle over our channels.

Imported in every worker of an engine, through `worker_extension_cls`: that registers the backend.
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megasd.rollout.vllm.experts import ExpertStacks
from megasd.rollout.vllm.send import Feed, Receiver
from megasd.rollout.vllm.versions import NoTrainerSide, drop_packed_experts, repack_heads

BACKEND = "megasd"


@dataclass
class Feeds(WeightTransferInitInfo):
    """Every channel of the engine; each worker takes the one that names it."""

    feeds: list[dict[str, Any]]


@dataclass
class Update(WeightTransferUpdateInfo):
    """All buckets of one update."""

    number: int


class StreamedWeights(NoTrainerSide, WeightTransferEngine[Feeds, Update]):
    """Reads a whole update from the worker's channel in one call.

    A model is loaded layer by layer, as vLLM loads a checkpoint again: what a kernel wants (packed,
    transposed, quantized) is made anew, in the memory that CUDA graphs know.
    """

    init_info_cls = Feeds
    update_info_cls = Update
    supports_draft_weight_update = False
    receiver: Receiver | None = None
    experts: ExpertStacks | None = None

    def init_transfer_engine(self, init_info: Feeds) -> None:
        worker = self.parallel_config.rank
        (feed,) = [
            feed for feed in (Feed(**plain) for plain in init_info.feeds) if worker in feed.workers
        ]
        self.receiver = Receiver(feed, worker, self.device)

    def start_weight_update(self) -> None:
        self.experts = self.experts or ExpertStacks(
            module for module in self.model.modules() if isinstance(module, RoutedExperts)
        )
        if self.device.type == "cpu":
            drop_packed_experts(self.model)
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        assert self.receiver is not None, "channels are joined before weights travel"
        assert self.experts is not None, "an update is started before its weights come"
        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            model: Any = self.model
            for tensors in self.receiver.buckets(update_info.number):
                model.load_weights(self.experts.take(tensors))
            self.experts.finish()

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                repack_heads(self.model)
        if self.device.type == "cuda":
            # Buckets and copies of layers: vLLM takes the cache's memory past torch's allocator,
            # which would keep theirs for itself.
            gc.collect()
            torch.cuda.empty_cache()

    def shutdown(self) -> None:
        self.receiver = None


class WorkerExtension:
    """Named by `worker_extension_cls`; importing it is all that is needed."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, StreamedWeights)
