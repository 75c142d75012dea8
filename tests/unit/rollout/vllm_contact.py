"""What one vLLM looks like from here, as JSON: run in a process of its own, which finds that vLLM.

`python -m tests.unit.rollout.vllm_contact OUT` with its Python files first on PYTHONPATH; nothing
of it needs to be compiled. `... OUT --record` puts its signatures into the file OUT, by release:
that is how vllm_edges.json was made.
"""

import contextlib
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

EXPERTS = "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts"
# What megasd calls, makes or subclasses. A class stands for its constructor.
EDGES = (
    "vllm.LLM",
    *(f"vllm.LLM.{name}" for name in ("wake_up", "sleep", "reset_prefix_cache")),
    *(f"vllm.LLM.{name}" for name in ("init_weight_transfer_engine", "start_weight_update")),
    *(f"vllm.LLM.{name}" for name in ("update_weights", "finish_weight_update")),
    *(f"vllm.v1.engine.llm_engine.LLMEngine.{name}" for name in ("step", "add_request")),
    "vllm.v1.engine.llm_engine.LLMEngine.abort_request",
    "vllm.v1.core.sched.scheduler.Scheduler.get_request_counts",
    "vllm.engine.arg_utils.EngineArgs",
    "vllm.SamplingParams",
    "vllm.outputs.RequestOutput",
    "vllm.outputs.CompletionOutput",
    "vllm.config.WeightTransferConfig",
    "vllm.config.set_current_vllm_config",
    "vllm.distributed.weight_transfer.base.WeightTransferEngine",
    "vllm.distributed.weight_transfer.base.WeightTransferInitInfo",
    "vllm.distributed.weight_transfer.base.WeightTransferUpdateInfo",
    "vllm.distributed.weight_transfer.factory.WeightTransferEngineFactory.register_engine",
    "vllm.model_executor.model_loader.reload.initialize_layerwise_reload",
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload",
    f"{EXPERTS}.weight_loader",
    f"{EXPERTS}._map_global_expert_id_to_local_expert_id",
)
ENGINE = "vllm.distributed.weight_transfer.base.WeightTransferEngine"
# Where the engine process reaches for what it drives and measures: class, then its attribute.
REACHES = (
    ("vllm.LLM", "llm_engine"),
    ("vllm.v1.engine.llm_engine.LLMEngine", "engine_core"),
    ("vllm.v1.engine.core_client.InprocClient", "engine_core"),
    ("vllm.v1.engine.core.EngineCore", "scheduler"),
    ("vllm.v1.core.sched.scheduler.Scheduler", "kv_cache_manager"),
    ("vllm.v1.core.kv_cache_manager.KVCacheManager", "usage"),
    ("vllm.distributed.weight_transfer.factory.WeightTransferEngineFactory", "_registry"),
    ("vllm.sampling_params.RequestOutputKind", "FINAL_ONLY"),
    ("vllm.logprobs.FlatLogprobs", "logprobs"),
    *((EXPERTS, name) for name in ("layer_name", "quant_config", "moe_config")),
    (EXPERTS, "global_num_experts"),
    ("vllm.model_executor.layers.fused_moe.config.FusedMoEConfig", "num_logical_experts"),
)


def named(path: str) -> Any:
    """The object of a dotted path: as much of it as is a module, then attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part)
            return found
    raise ModuleNotFoundError(path)


def plain(callable_: Any) -> str:
    """Its parameters without annotations; `=0` stands for any default."""
    parameters = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=parameter.default if parameter.default is inspect.Parameter.empty else 0,
        )
        for parameter in inspect.signature(callable_).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def record() -> dict[str, Any]:
    engine = named(ENGINE)
    return {
        "signatures": {edge: plain(named(edge)) for edge in EDGES},
        "engine": {
            name: plain(value.__func__ if isinstance(value, staticmethod) else value)
            for name, value in vars(engine).items()
            if inspect.isroutine(value) or isinstance(value, staticmethod)
        },
        "abstract": sorted(engine.__abstractmethods__),
        "reaches": [f"{path}.{name}" for path, name in REACHES if has(named(path), name)],
    }


def has(owner: type, name: str) -> bool:
    """As a member, or as what one of its methods sets."""
    source = "".join(inspect.getsource(one) for one in owner.__mro__[:-1] if is_vllms(one))
    members = {*dir(owner), *getattr(owner, "__dataclass_fields__", ())}
    return name in members or re.search(rf"self\.{name}\b[^=\n]*= ", source) is not None


def is_vllms(owner: type) -> bool:
    return owner.__module__.startswith("vllm")


def contact() -> dict[str, Any]:
    """Makes the transfer engine and asks this vLLM's FP8 about modules."""
    import vllm
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megasd.rollout.vllm import receive, versions

    versions.probe()
    engine = engine_on("cpu")
    registered = WeightTransferEngineFactory._registry[receive.BACKEND]
    assert registered() is receive.StreamedWeights
    return {
        "version": vllm.__version__,
        "records": record(),
        "init_info": engine.parse_init_info({"feeds": []}).feeds,
        "update_info": engine.parse_update_info({"number": 3}).number,
        "lacking": sentence_about("something_new"),
        "finish": order_of_finish(),
        "sends": sentence_of(lambda: engine.trainer_send_weights(iter(()), {})),
        "float8": {kind: float8_modules(kind) for kind in ("qwen3", "qwen3_moe")},
        "stacks": {kind: calls_for_stacks(kind) for kind in ("plain", "float8")},
    }


def engine_on(device: str) -> Any:
    from types import SimpleNamespace

    import torch
    from vllm.config import WeightTransferConfig

    from megasd.rollout.vllm.receive import BACKEND, StreamedWeights

    config: Any = SimpleNamespace(parallel_config=None, model_config=None)
    transfer = WeightTransferConfig(backend=BACKEND)
    return StreamedWeights(transfer, config, torch.device(device), torch.nn.Linear(1, 1))


def sentence_of(what: Any) -> str:
    try:
        what()
    except RuntimeError as error:
        return str(error)
    return ""


def sentence_about(method: str) -> str:
    """What probe says where vLLM wants `method` of an engine."""
    from megasd.rollout.vllm import receive, versions

    mine: Any = receive.StreamedWeights
    before, mine.__abstractmethods__ = mine.__abstractmethods__, frozenset({method})
    try:
        return sentence_of(versions.probe)
    finally:
        mine.__abstractmethods__ = before


def order_of_finish() -> list[str]:
    """What a worker on a GPU does last in an update."""
    from unittest.mock import patch

    import torch

    from megasd.rollout.vllm import receive

    done: list[str] = []
    with (
        patch.object(receive, "set_current_vllm_config", lambda _: contextlib.nullcontext()),
        patch.object(receive, "finalize_layerwise_reload", lambda *_: done.append("finalize")),
        patch.object(receive.gc, "collect", lambda: done.append("collect")),
        patch.object(torch.cuda, "empty_cache", lambda: done.append("empty_cache")),
    ):
        engine_on("cuda").finish_weight_update()
    return done


def float8_modules(kind: str) -> dict[str, bool]:
    """Every linear layer of a tiny model: whether vLLM makes it in float8 with megasd's options."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

    from megasd.rollout.config import VLLMConfig
    from megasd.rollout.vllm.options import engine_options
    from tests.unit.rollout.test_vllm_options import shapes_of

    options = engine_options(
        VLLMConfig(quantization="fp8"),
        Path("model"),
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        max_tokens=64,
        hf_shapes=shapes_of(kind),
    )
    config = Fp8Config.from_config(options["hf_overrides"]["quantization_config"])
    model: Any = {"qwen3": Qwen3ForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}[kind]
    config.packed_modules_mapping = fused = model.packed_modules_mapping
    parts = {part: whole for whole, parts in fused.items() for part in parts}
    linear: Any = LinearBase.__new__(LinearBase)
    found = {}
    for name, shape in shapes_of(kind).items():
        if len(shape) != 2 or "layers" not in name:
            continue
        module = name.removesuffix(".weight")
        head, _, last = module.rpartition(".")
        if ".experts." in name:
            prefix = head[: head.index(".experts.") + len(".experts")]
        else:
            prefix = f"{head}.{parts.get(last, last)}"
        skipped = is_layer_skipped(prefix, config.ignored_layers, fused)
        if skipped:
            assert isinstance(config.get_quant_method(linear, prefix), UnquantizedLinearMethod)
        found[name] = not skipped
    return found


def calls_for_stacks(kind: str) -> int:
    """Calls of the loader for four experts, two of which a worker keeps, cut over two workers.

    0 where whole stacks make anything else of the parameters than expert after expert.
    """
    import torch

    from megasd.rollout.vllm.experts import ExpertStacks

    wide, deep = 256, 512  # of a projection: rows, columns
    draws = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (wide, deep), "up_proj": (wide, deep), "down_proj": (deep, wide)}
    tensors = {
        f"model.layers.0.mlp.experts.{expert}.{name}.weight": torch.rand(shape, generator=draws)
        for name, shape in shapes.items()
        for expert in range(4)
    }
    if kind == "float8":
        tensors |= {
            f"{name}_scale_inv": tensor[::128, ::128].contiguous()
            for name, tensor in tensors.items()
        }
    one, by_one = experts_layer(kind, wide, deep)
    for name, tensor in tensors.items():
        _, expert, projection, what = name.rsplit(".", 3)
        part = "w2" if projection == "down_proj" else "w13"
        parameter = getattr(one, f"{part}_{what}")
        shard = {"gate_proj": "w1", "up_proj": "w3"}.get(projection, "w2")
        parameter.weight_loader(
            parameter, tensor, f"{one.layer_name}.{part}_{what}", shard, int(expert), True
        )
    other, calls = experts_layer(kind, wide, deep)
    stacks = ExpertStacks([other])
    assert list(stacks.take({"norm": torch.ones(1)} | tensors)) == [("norm", torch.ones(1))]
    stacks.finish()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    same = all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)
    assert len(by_one) == len(tensors)
    return len(calls) if same else 0


def experts_layer(kind: str, wide: int, deep: int) -> tuple[Any, list[str]]:
    """vLLM's module with the parameters of its worker 1 of 2, and a list of its loader's calls."""
    from types import SimpleNamespace

    import torch

    layer: Any = object.__new__(named(EXPERTS))
    torch.nn.Module.__init__(layer)
    layer.layer_name = "model.layers.0.mlp.experts"
    layer.quant_config = SimpleNamespace(get_name=lambda: "fp8") if kind == "float8" else None
    layer.quant_method, layer._fused_shared_expert_quantizer = SimpleNamespace(), None
    layer.global_num_experts = 4
    layer.expert_map_manager = SimpleNamespace(map_global_to_local=lambda e: [-1, 1, -1, 0][e])
    layer.moe_config = SimpleNamespace(
        tp_rank=1,
        moe_parallel_config=SimpleNamespace(tp_size=2),
        is_act_and_mul=True,
        num_logical_experts=4,
        tp_shard_with_padding=False,
    )
    calls: list[str] = []

    def load(*args: Any, **options: Any) -> Any:
        calls.append("")
        return named(EXPERTS).weight_loader(layer, *args, **options)

    shapes = {"w13_weight": (2, wide, deep), "w2_weight": (2, deep, wide // 2)}
    if kind == "float8":
        shapes |= {f"{n}_scale_inv": (e, r // 128, c // 128) for n, (e, r, c) in shapes.items()}
    for name, shape in shapes.items():
        parameter: Any = torch.nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
        parameter.weight_loader, parameter.quant_method = load, "block"
        layer.register_parameter(name, parameter)
    return layer, calls


def main() -> None:
    import vllm

    out = Path(sys.argv[1])  # vllm prints to stdout
    if "--record" not in sys.argv:
        out.write_text(json.dumps(contact()))
        return
    known = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(known | {vllm.__version__: record()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
