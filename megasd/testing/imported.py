"""What nearly every process of a test imports, once, before it is forked (forked.py)."""

import gc
import importlib

from megasd.policy import backend

backend.start("cpu")  # before Megatron is imported
for module in (
    "megasd.cli",
    "megasd.run",
    "megasd.checkpoint.export",
    "megasd.loop.train",
    "megasd.loop.diagnostics",
    "megasd.loop.ending",
    "megasd.loop.health",
    "megasd.policy.policy",
    "megasd.rollout.checks",
    "megasd.rollout.hf",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.auto.tokenization_auto",
    "torch._dynamo",  # by optimizers
    "torch.distributed.fsdp",
    "torch.distributed.nn",
):
    importlib.import_module(module)
gc.collect()
gc.freeze()  # the forked ones need not look at it
