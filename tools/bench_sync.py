"""Seconds and memory of a weight sync against a memory copy, and against mbridge's export.

    python tools/bench_sync.py                    # a Qwen3 of the 0.6B sizes, bfloat16, TP2
    python tools/bench_sync.py --pipeline 2 --tensor 1 --json

Two gloo ranks on a CPU hold a random model. A sync is a walk over all buckets, as it feeds an
engine, with a reader that takes nothing; the copy moves the same bytes of full tensors within one
process, into memory that is there already. Variants take turns in the same processes; medians of
the slower rank are printed. `extra` is the peak of resident memory during the first walk over what
was in use before it. mbridge is measured if it can be imported; it is no dependency (pip install
--no-deps --target DIR mbridge==0.15.1, then PYTHONPATH=DIR).
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megasd.testing.ranks import Ranks

MIB = 2**20
SIZES = {  # of Qwen3-0.6B
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "attention_bias": False,
}


# As tools/setup.sh sets them: glibc gives a freed buffer back at once, and faults it in again.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def main() -> None:
    os.environ.update(MALLOC)  # the ranks start with them
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    ranks = Ranks(args.tensor * args.pipeline, timeout_seconds=1800)
    try:
        results = ranks.run(measure, vars(args), world_size=ranks.size)
    finally:
        ranks.close()
    report(args, results)


def measure(args: dict[str, Any]) -> dict[str, Any]:
    """On every rank: seconds of each variant by repeat, and the memory of a walk."""
    import torch
    import torch.distributed as dist

    from megasd.policy import backend
    from megasd.policy.config import ModelConfig, ParallelConfig

    started = backend.start("cpu")
    from megasd.policy.megatron.build import build_model, start_parallel
    from megasd.weights.reshard import ReshardPlan, reshard
    from megasd.weights.tables import table_for

    parallel = ParallelConfig(tensor=args["tensor"], pipeline=args["pipeline"])
    layout = start_parallel(parallel, started, seed=0)
    hf_config = SIZES | {"num_hidden_layers": args["layers"]}
    gpt = build_model(hf_config, ModelConfig(), layout, started)
    for number, parameter in enumerate(gpt.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    table = table_for(hf_config)
    plan = ReshardPlan(table, layout.sizes, bucket_bytes=args["bucket_mib"] * MIB)
    parameters = dict(gpt.named_parameters())
    elements = sum(torch.Size(shape).numel() for shape in table.hf_shapes().values())
    source = torch.ones(elements, dtype=torch.bfloat16)
    target = torch.zeros_like(source)

    def sync() -> None:
        for _ in reshard(plan, parameters, layout.place):
            pass

    dist.barrier()
    extra_bytes = peak_over(sync)  # the first walk: nothing is held back from another
    variants: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "sync": sync}
    if importlib.util.find_spec("mbridge") is not None:
        peer = Peer(gpt, hf_config)
        check_peer(peer, dict(copies(reshard(plan, parameters, layout.place))))
        variants["mbridge"] = peer.walk
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args["repeats"] + 1):  # the first warms up
        for name, variant in variants.items():
            dist.barrier()
            began = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - began)
    largest = max(map(plan.round_elements, plan.rounds(2)))
    return {
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "bytes": 2 * elements,
        "bucket_bytes": max(plan.bucket_bytes, 2 * largest),
        "rounds": len(plan.rounds(2)),
        "extra_bytes": extra_bytes,
    }


def copies(buckets: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    for bucket in buckets:
        yield from ((name, tensor.clone()) for name, tensor in bucket.tensors.items())


class Peer:
    """mbridge's export of the same parameters, under the names of Transformer Engine's spec."""

    def __init__(self, gpt: Any, hf_config: dict[str, Any]) -> None:
        import torch
        from mbridge.core.auto_bridge import AutoBridge  # pyright: ignore[reportMissingImports]
        from transformers import Qwen3Config

        from megasd.weights.tables import table_for

        renamed = {
            ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
            ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
        }

        class Renamed(torch.nn.Module):
            """The model as mbridge reads it: a config and named parameters."""

            config = gpt.config

            def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
                for name, parameter in gpt.named_parameters():
                    for ours, theirs in renamed.items():
                        name = name.replace(ours, theirs)
                    yield name, parameter

            def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
                return dict(self.named_parameters())

            def __getattr__(self, name: str) -> Any:
                return getattr(gpt, name)

        table = table_for(hf_config)
        for name, parameter in gpt.named_parameters():  # marks that Megatron's own init sets
            kind = table.find(name).row.kind
            parameter.tensor_model_parallel = kind != "replicated"
            parameter.partition_dim = int(kind == "row")
        self.bridge = AutoBridge.from_config(Qwen3Config(**hf_config))
        self.model = Renamed()

    def tensors(self) -> Iterator[tuple[str, Any]]:
        return self.bridge.export_weights([self.model])

    def walk(self) -> None:
        for _ in self.tensors():
            pass


def check_peer(peer: Peer, expected: dict[str, Any]) -> None:
    """Both exports are the same bytes, or the comparison means nothing."""
    import torch

    theirs = {name: tensor.clone() for name, tensor in peer.tensors()}
    theirs.pop("lm_head.weight", None)
    assert theirs.keys() == expected.keys(), theirs.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, theirs[name][: len(tensor)]), name


def peak_over(work: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises above its level before `work`; Linux's own account."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    first = results[0]
    seconds = {
        name: statistics.median(np.max([r["seconds"][name] for r in results], axis=0))
        for name in first["seconds"]
    }
    extra = max(result["extra_bytes"] for result in results)
    gigabytes = first["bytes"] / 1e9
    print(
        f"{gigabytes:.2f} GB in {first['rounds']} rounds, TP{args.tensor} PP{args.pipeline}, "
        f"buckets of {first['bucket_bytes'] / MIB:.0f} MiB, {args.repeats} repeats"
    )
    for name, value in seconds.items():
        print(f"{name:8} {value:7.3f} s  {gigabytes / value:6.2f} GB/s")
    print(f"extra memory of a sync {extra / MIB:.0f} MiB")
    if args.json:
        peer = seconds.get("mbridge")
        figures = {
            "copy_ratio": seconds["sync"] / seconds["copy"],
            "peer_ratio": None if peer is None else peer / seconds["sync"],
            "extra_bytes": extra,
            "bucket_bytes": first["bucket_bytes"],
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
