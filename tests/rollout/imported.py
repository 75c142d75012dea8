"""What an engine's process imports, once, before it is forked (nursery.py)."""

import gc
import importlib

gc.disable()
for module in (
    "vllm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen3_moe",
    "megasd.rollout.vllm.process",
    "megasd.rollout.vllm.receive",
    "megasd.rollout.vllm.versions",
):
    importlib.import_module(module)
gc.enable()
gc.freeze()
