"""Seconds and memory of conversion against a copy of the files, and against mbridge.

    python tools/bench_convert.py                     # a Qwen3 of the 0.6B sizes, bfloat16
    python tools/bench_convert.py --layers 4 --json   # smaller; the last line is one JSON object

Every run is a fresh process with one thread; variants take turns, medians are printed. `copy` is
cp of the same files, forced to disk (fsync) as a conversion's are; `copy, cached` is cp alone.
Imports are not counted, and for mbridge building its model is not either: to_megatron is its
load_weights and Megatron's dist_checkpointing.save, to_hf is dist_checkpointing.load and its
save_weights; what it wrote is compared with what was to be written. `extra` is the peak of
anonymous memory (mapped files aside) over what was in use before. mbridge is measured if it can be
imported; it is no dependency (pip install --no-deps --target DIR mbridge==0.15.1, then
PYTHONPATH=DIR). On a busy machine compare the CPU seconds.
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_sync import SIZES, Peer

from megasd.testing.ranks import Ranks

MIB = 2**20
OURS, PEER = ("to_megatron", "to_hf"), ("mbridge to_megatron", "mbridge to_hf")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        fresh(make_model, folder, args.layers)
        variants = ("copy", *OURS)
        if importlib.util.find_spec("mbridge") is not None:
            variants += PEER
        runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for repeat in range(args.repeats):
            for variant in variants:
                os.sync()  # nobody pays for what another wrote
                runs[variant].append(fresh(measure, folder, variant, repeat == 0))
        size = (folder / "hf" / "model.safetensors").stat().st_size
    report(runs, size, as_json=args.json)


def fresh(case: Callable[..., Any], *args: Any) -> Any:
    """`case(*args)` in a process of its own, with a process group of one."""
    ranks = Ranks(1, timeout_seconds=1800)
    try:
        return ranks.run(case, *args, world_size=1)[0]
    finally:
        ranks.close()


def make_model(folder: Path, layers: int) -> None:
    """FOLDER/hf: random weights."""
    import torch
    from safetensors.torch import save_file

    from megasd.weights.tables import table_for

    hf_config = SIZES | {"num_hidden_layers": layers, "dtype": "bfloat16"}
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=draw).bfloat16()
        for name, shape in table_for(hf_config).hf_shapes().items()
    }
    (folder / "hf").mkdir()
    save_file(tensors, folder / "hf" / "model.safetensors", {"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(hf_config))


def measure(folder: Path, variant: str, check: bool) -> dict[str, float]:
    """Runs one variant; `check` compares what it wrote with the model."""
    target = folder / variant
    shutil.rmtree(target, ignore_errors=True)
    if variant == "copy":
        return timed(lambda: copy(folder / "hf", target))
    if variant in PEER:
        return measure_peer(folder, target, variant, check)
    from megasd.weights.conversion import hf_to_megatron, megatron_to_hf
    from megasd.weights.layout import Sizes

    if variant == "to_megatron":
        return timed(lambda: hf_to_megatron(folder / "hf", target, Sizes()))
    result = timed(lambda: megatron_to_hf(folder / "to_megatron", target))
    if check:
        same_files(folder / "hf", target)
    return result


def copy(source: Path, target: Path) -> float:
    """Returns the seconds until cp was done, before the disk had it."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    cached = time.perf_counter() - began
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return cached


def measure_peer(folder: Path, target: Path, variant: str, check: bool) -> dict[str, float]:
    import torch

    from megasd.policy import backend
    from megasd.policy.config import ModelConfig, ParallelConfig

    started = backend.start("cpu")
    from megatron.core import dist_checkpointing

    from megasd.policy.megatron.build import build_model, start_parallel
    from megasd.weights.conversion import megatron_to_hf

    layout = start_parallel(ParallelConfig(), started, seed=0)
    hf_config = json.loads((folder / "hf" / "config.json").read_text())
    gpt: Any = build_model(hf_config, ModelConfig(), layout, started)
    peer = Peer(gpt, hf_config)
    to_megatron, to_hf = (folder / name for name in PEER)

    def load_and_save() -> None:
        peer.bridge.load_weights([peer.model], str(folder / "hf"))
        to_megatron.mkdir()
        dist_checkpointing.save({"model": gpt.sharded_state_dict()}, str(to_megatron))

    def restore_and_export() -> None:
        state: Any = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, str(to_megatron))
        gpt.load_state_dict(state["model"], strict=False)
        peer.bridge.safetensor_io = peer.bridge._get_safetensor_io(str(folder / "hf"))
        peer.bridge.save_weights([peer.model], str(to_hf))

    with torch.no_grad():
        result = timed(load_and_save if variant == PEER[0] else restore_and_export)
    if check:
        if variant == PEER[0]:
            megatron_to_hf(to_megatron, target.with_name("back"), source=folder / "hf")
            same_files(folder / "hf", target.with_name("back"))
        else:
            same_tensors(folder / "hf", to_hf)
    return result


def same_files(one: Path, other: Path) -> None:
    for path in one.iterdir():
        if path.read_bytes() != (other / path.name).read_bytes():
            raise ValueError(f"{other / path.name} differs from {path}")


def same_tensors(one: Path, other: Path) -> None:
    import torch
    from safetensors.torch import load_file

    expected = load_file(one / "model.safetensors")
    parts = [load_file(file) for file in other.glob("*.safetensors")]
    found = {name: tensor for part in parts for name, tensor in part.items()}
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            raise ValueError(f"{name} in {other} differs from {one}")


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds, of child processes too, and the peak of memory over its start."""
    from megasd.weights.conversion import anonymous_memory

    peak = before = anonymous_memory()

    @contextmanager
    def sampled() -> Iterator[None]:
        nonlocal peak
        done = threading.Event()

        def look() -> None:
            nonlocal peak
            while not done.wait(0.005):
                peak = max(peak, anonymous_memory())

        thread = threading.Thread(target=look)
        thread.start()
        yield
        done.set()
        thread.join()

    with sampled():
        began, began_cpu = time.perf_counter(), cpu_seconds()
        result = work()
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - began_cpu
    cached = {} if result is None else {"cached_seconds": result}
    return {"seconds": seconds, "cpu_seconds": cpu, "extra_bytes": peak - before, **cached}


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def report(runs: dict[str, list[dict[str, float]]], size: int, *, as_json: bool) -> None:
    def median(variant: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[variant])

    print(f"{size / 1e9:.2f} GB, {len(runs['copy'])} repeats")
    print(f"{'':22}{'seconds':>9}{'GB/s':>7}{'CPU s':>8}{'extra MiB':>11}")
    print(f"{'copy, cached':22}{median('copy', 'cached_seconds'):9.2f}")
    for variant in runs:
        seconds = median(variant, "seconds")
        print(
            f"{variant:22}{seconds:9.2f}{size / seconds / 1e9:7.2f}"
            f"{median(variant, 'cpu_seconds'):8.2f}{median(variant, 'extra_bytes') / MIB:11.0f}"
        )
    if as_json:
        ours, peer = (
            sum(median(variant, "seconds") for variant in pair) if pair[0] in runs else None
            for pair in (OURS, PEER)
        )
        assert ours is not None
        figures = {
            "copy_ratio": ours / 2 / median("copy", "seconds"),
            "peer_ratio": None if peer is None else peer / ours,
            "extra_bytes": max(median(variant, "extra_bytes") for variant in OURS),
            "file_bytes": size,
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
