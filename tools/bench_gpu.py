"""What a GPU reaches: products and copies, the vocabulary head, the passes of a slice of Qwen3-8B.

    python tools/bench_gpu.py machine   # versions, a large product and a copy against the peaks
    python tools/bench_gpu.py head      # against its products alone, and the heads of others
    python tools/bench_gpu.py passes    # MFU of scoring and update, their memory; --fp8 blockwise
    python tools/bench_gpu.py run RUN   # what the last step of a run took, its engine's distance

Times are medians in seconds, of a device that has finished what came before; peaks are those of
megasd/planner/hardware.py. Figures come as lines `FIGURES {...}`, which tools/gpu_check.py gathers.
Without a GPU the same code runs on the CPU, at sizes that one can wait for (`--tokens`, ...); then
no figure is a share of a peak. Not yet run on a GPU.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from unittest import mock

if TYPE_CHECKING:
    from torch import Tensor

    from megasd.planner.hardware import GPU
    from megasd.policy.config import Recipe
    from megasd.policy.policy import Policy

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "vllm", "transformers"),
    *("liger-kernel", "cut-cross-entropy", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"),
)
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(parser().parse_args(arguments))
    command, device = options.pop("command"), options.pop("device") or best_device()
    if command == "machine":
        report(measure_machine(device, **options))
    elif command == "head":
        for figures in measure_head(device, **options):
            report(figures)
    elif command == "run":
        report(last_step(options["folder"]))
    else:
        layers = options.pop("layers")
        with tempfile.TemporaryDirectory() as folder:
            for figures in measure_passes(device, slice_of_8b(Path(folder), layers), **options):
                report(figures)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    whole.add_argument("--repeats", type=int, default=5)
    commands = whole.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("folder", type=Path)
    machine = commands.add_parser("machine")
    machine.add_argument("--size", type=int, default=8192, help="of the square matrices")
    head = commands.add_parser("head")
    for name, default in {"tokens": 8192, "hidden": 4096, "vocab": 151_936}.items():
        head.add_argument(f"--{name}", type=int, default=default)
    passes = commands.add_parser("passes")
    for name, default in {"layers": 4, "tokens": 16_384, "length": 2048, "prompt": 256}.items():
        passes.add_argument(f"--{name}", type=int, default=default)
    passes.add_argument("--microbatches", type=int, default=2, help="of so many tokens in a pass")
    passes.add_argument("--fp8", choices=["blockwise", "tensorwise", "delayed"])
    return whole


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def report(figures: Mapping[str, Any]) -> None:
    for name, value in figures.items():
        print(f"{name:<36} {value}")
    print("FIGURES " + json.dumps(figures))


def peak(device: str) -> "GPU | None":
    """What its vendor says of this GPU; None: not in the planner's table, or of another form."""
    import torch

    from megasd.planner.hardware import GPUS

    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    if re.search(r"PCIe|NVL", name):
        return None
    return next((gpu for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", name)), None)


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """After one run that compiles and chooses kernels."""
    run()
    found = []
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def wait_for(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def last_step(folder: Path) -> dict[str, float]:
    """Seconds by phase, and the distance of the engine's log-probs, of the last optimizer step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row = [row for row in rows if "time/step" in row][-1]
    wanted = re.compile(r"time/|speed/tokens|engine/probe|fp8/|update/(grad_norm|mismatch/abs)")
    return {name: rounded(value) for name, value in row.items() if wanted.match(name)}


# --- the machine ----------------------------------------------------------------------------------


def measure_machine(device: str, *, size: int, repeats: int) -> dict[str, Any]:
    import torch
    from torch.cuda import nccl

    from megasd.doctor.machine import read_gpus
    from megasd.metrics.run_folder import versions

    figures: dict[str, Any] = {k: v for k, v in versions(PACKAGES).items() if v is not None}
    if device == "cuda":
        figures |= {
            "GPU": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "GiB": rounded(torch.cuda.get_device_properties(0).total_memory / GIB),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": ".".join(map(str, nccl.version())),
            "driver": gpus[0].driver if (gpus := read_gpus()) else None,
        }
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_seconds(lambda: one @ other, device, repeats)
    copied = torch.empty_like(one)
    copying = median_seconds(lambda: copied.copy_(one), device, repeats)
    flops, bandwidth = 2 * size**3 / product, 2 * one.nbytes / copying
    figures |= {"product_tflops": rounded(flops / 1e12), "copy_tb": rounded(bandwidth / 1e12)}
    if gpu := peak(device):
        figures["product_of_peak"] = rounded(flops / gpu.bf16_flops)
        figures["copy_of_peak"] = rounded(bandwidth / gpu.memory_bandwidth)
    return figures


# --- the vocabulary head --------------------------------------------------------------------------


def measure_head(
    device: str, *, tokens: int, hidden: int, vocab: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Log-probs, full divergences, then the heads of others: figures as soon as they are known."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    states, weight = (
        torch.empty(rows, hidden, device=device, dtype=dtype).normal_(std=scale)
        for rows, scale in ((tokens, 1.0), (vocab, hidden**-0.5))
    )
    targets = torch.randint(vocab, (tokens,), device=device)
    products = _product_seconds(states, weight, device, repeats)
    forward, backward = products["logits"], sum(products.values())  # which makes logits again
    floors = {
        "floor_forward": rounded(forward),
        "floor_step": rounded(forward + backward),
        "floor_divergence": rounded(2 * (2 * forward) + forward + backward),
    }
    yield floors
    if gpu := peak(device):
        flops = 2 * tokens * hidden * vocab
        yield {"product_of_peak": rounded(flops / forward / gpu.bf16_flops)}
    yield _our_head(states, weight, targets, device, repeats, floors)
    yield _our_divergences(states, weight, device, repeats, floors)
    yield from _other_heads(states, weight, targets, device, repeats)


def _product_seconds(
    states: "Tensor", weight: "Tensor", device: str, repeats: int
) -> dict[str, float]:
    logits = states @ weight.T
    return {
        "logits": median_seconds(lambda: states @ weight.T, device, repeats),
        "of states": median_seconds(lambda: logits @ weight, device, repeats),
        "of weight": median_seconds(lambda: logits.T @ states, device, repeats),
    }


def _our_head(
    states: "Tensor",
    weight: "Tensor",
    targets: "Tensor",
    device: str,
    repeats: int,
    floors: Mapping[str, float],
) -> dict[str, Any]:
    """Forward and a step, whose weight's gradient goes where Megatron's DDP sums it."""
    import torch

    from megasd.policy.config import ModelConfig
    from megasd.policy.head import blocks
    from megasd.policy.head.head import vocabulary_head

    chunk = ModelConfig().head_chunk_tokens_on(device)
    upstream = torch.ones(len(states), device=device)
    learns: Any = weight.clone().requires_grad_()
    learns.main_grad = torch.zeros(weight.shape, device=device)
    learns.grad_added_to_main_grad = False
    read = states.clone().requires_grad_()

    def forward() -> "Tensor":
        out = vocabulary_head(
            read, learns, targets, vocab_size=len(weight), temperature=1.0, chunk_tokens=chunk
        )
        return out.logprobs

    def step() -> None:
        read.grad = learns.grad = None
        forward().backward(upstream)

    figures: dict[str, Any] = {}
    ways: dict[str, Callable[[str], Any]] = {"torch": lambda _: None}
    if blocks.find_kernels(device) is not None:
        ways = {"kernels": blocks.find_kernels, **ways}
    for name, find in ways.items():
        with mock.patch.object(blocks, "find_kernels", find):
            with torch.no_grad():
                seconds = median_seconds(forward, device, repeats)
            figures[f"{name}_forward"] = rounded(seconds)
            figures[f"{name}_forward_of_floor"] = rounded(seconds / floors["floor_forward"])
            with extra_memory(device) as extra:
                seconds = median_seconds(step, device, repeats)
            figures[f"{name}_step"] = rounded(seconds)
            figures[f"{name}_step_of_floor"] = rounded(seconds / floors["floor_step"])
            figures |= {f"{name}_{key}": value for key, value in extra.items()}
    return figures


def _our_divergences(
    states: "Tensor", weight: "Tensor", device: str, repeats: int, floors: Mapping[str, float]
) -> dict[str, Any]:
    """A step of each kind, from a teacher of the same size."""
    import torch

    from megasd.policy.config import ModelConfig
    from megasd.policy.head.divergence import full_divergence
    from megasd.types import DivergenceKind

    chunk = ModelConfig().head_chunk_tokens_on(device)
    upstream = torch.ones(len(states), device=device)
    read, learns = states.clone().requires_grad_(), weight.clone().requires_grad_()
    teacher = states.flip(0), weight.flip(0)

    def step(kind: DivergenceKind) -> None:
        read.grad = learns.grad = None
        value = full_divergence(
            *(read, learns, *teacher), kind=kind, vocab_size=len(weight), chunk_tokens=chunk
        )
        value.backward(upstream)

    figures: dict[str, Any] = {}
    for kind in get_args(DivergenceKind):
        with extra_memory(device) as extra:
            seconds = median_seconds(lambda kind=kind: step(kind), device, repeats)
        figures[f"{kind}_step"] = rounded(seconds)
        figures[f"{kind}_step_of_floor"] = rounded(seconds / floors["floor_divergence"])
        figures |= {f"{kind}_{key}": value for key, value in extra.items()}
    return figures


def _other_heads(
    states: "Tensor", weight: "Tensor", targets: "Tensor", device: str, repeats: int
) -> Iterator[dict[str, Any]]:
    """A step of the cross-entropy of others, where installed; a failure is a figure too."""
    read, learns = states.clone().requires_grad_(), weight.clone().requires_grad_()
    for name, make in OTHERS.items():
        try:
            loss = make()
        except ImportError:
            continue

        def step(loss: Callable[..., "Tensor"] = loss) -> None:
            read.grad = learns.grad = None
            loss(read, learns, targets).mean().backward()

        try:
            with extra_memory(device) as extra:
                seconds = median_seconds(step, device, repeats)
            found = {"step": rounded(seconds), **extra}
            yield {f"{name}_{key}": value for key, value in found.items()}
        except Exception as error:
            yield {f"{name}_failed": f"{type(error).__name__}: {error}"[:200]}


def _plain() -> Callable[..., "Tensor"]:
    from torch.nn.functional import cross_entropy

    return lambda read, weight, targets: cross_entropy((read @ weight.T).float(), targets)


def _liger() -> Callable[..., "Tensor"]:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda read, weight, targets: loss(weight, read, targets)


def _cut_cross_entropy() -> Callable[..., "Tensor"]:
    from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy,
    )

    return lambda read, weight, targets: linear_cross_entropy(read, weight, targets)


OTHERS = {"plain": _plain, "liger": _liger, "cut_cross_entropy": _cut_cross_entropy}


@contextmanager
def extra_memory(device: str) -> Iterator[dict[str, float]]:
    """Filled when the block ends: the peak of what torch allocated in it, beside what there was."""
    import torch

    found: dict[str, float] = {}
    if device == "cpu":
        yield found
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    found["extra_gib"] = rounded((torch.cuda.max_memory_allocated() - before) / GIB)


# --- the passes -----------------------------------------------------------------------------------


def slice_of_8b(folder: Path, layers: int) -> Path:
    from megasd.testing.hollow import hollow_qwen3

    return hollow_qwen3(folder / "model", "8B", layers=layers)


def measure_passes(
    device: str,
    folder: Path,
    *,
    tokens: int,
    length: int,
    prompt: int,
    microbatches: int,
    repeats: int,
    fp8: "Recipe | None" = None,
) -> Iterator[dict[str, Any]]:
    """Scoring and a step over micro-batches of `tokens`, in sequences of `length`.

    MFU: of a pass, the products of layers, attention (half of it is masked) and head that a model
    asks for, nothing twice, by the bfloat16 peak; also where layers multiply in float8.
    """
    from megasd.planner.model import Model
    from megasd.planner.passes import Pass

    policy = _random_policy(device, folder, tokens=tokens, fp8=fp8)
    read, learn, responses = _steps(
        policy, count=microbatches * tokens // length, length=length, prompt=prompt
    )
    work = Pass(
        model=Model.of(policy.hf_config),
        tokens=microbatches * tokens,
        responses=responses,
        length=length,
        backwards=1,
    )
    flops, gpu = work.model_flops(), peak(device)

    def mfu(name: str, flops: float, seconds: float) -> dict[str, float]:
        return {name: rounded(flops / seconds / gpu.bf16_flops)} if gpu else {}

    score = median_seconds(read, device, repeats)
    yield {"score": rounded(score), **mfu("score_mfu", flops / 3, score)}
    learn()  # and the optimizer has its state
    with extra_memory(device) as extra:
        update = median_seconds(learn, device, repeats)
    yield {"update": rounded(update), "update_tflop": rounded(flops / 1e12)}
    yield mfu("update_mfu", flops, update) | {f"update_{k}": v for k, v in extra.items()}
    optimizer = median_seconds(policy.state.optimizer.step, device, repeats)
    yield {"optimizer": rounded(optimizer)}
    yield mfu("update_mfu_without_optimizer", flops, update - optimizer)


def _random_policy(device: str, folder: Path, *, tokens: int, fp8: "Recipe | None") -> "Policy":
    """With weights as a model begins: zeros would take a GPU less power, and so less time."""
    import torch
    import torch.distributed as dist

    from megasd.losses.config import MismatchConfig
    from megasd.policy import backend
    from megasd.policy.config import (
        FP8Config,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        TeacherConfig,
    )

    started = backend.start(device, recipe=fp8)
    if not dist.is_initialized():
        backend.join_ranks(started, timeout_seconds=60)
    from megasd.policy.policy import Policy  # not before the backend was chosen

    policy = Policy(
        model=ModelConfig(path=str(folder), fp8=FP8Config(recipe=fp8) if fp8 else None),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(max_tokens_per_microbatch=tokens, warmup_steps=0),
        teacher=TeacherConfig(),
        backend=started,
        temperature=1.0,
        mismatch=MismatchConfig(level="off"),
        total_steps=1000,
        seed=0,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    policy.state.optimizer.reload_model_params()
    return policy


def _steps(
    policy: "Policy", *, count: int, length: int, prompt: int
) -> tuple[Callable[[], object], Callable[[], object], int]:
    """A scoring pass, an update, and how many tokens the head reads in each."""
    import numpy as np
    import torch

    from megasd.algorithms.grpo import GRPO
    from megasd.types import Credit, ResponseBatch, View

    draw, vocab, device = np.random.default_rng(0), policy.state.vocab_size, policy.state.device
    views: Sequence[View] = [
        View(
            prompt_ids=draw.integers(1, vocab, prompt),
            response_ids=draw.integers(1, vocab, length - prompt),
        )
        for _ in range(count)
    ]
    offsets = np.arange(count + 1) * (length - prompt)
    n = int(offsets[-1])
    batch = ResponseBatch(
        rewards=torch.zeros(count, device=device),
        is_correct=torch.zeros(count, dtype=torch.bool, device=device),
        group_ids=torch.arange(count, device=device) // 2,
        minibatch_ids=torch.zeros(count, dtype=torch.int64, device=device),
        rollout_ids=torch.arange(count, device=device).repeat_interleave(length - prompt),
        response_mask=torch.ones(n, dtype=torch.bool, device=device),
        max_response_tokens=length - prompt,
    )
    credit = Credit(
        advantages=torch.randn(n, device=device),
        token_weights=torch.ones(n, device=device),
        path=torch.zeros(n, dtype=torch.int64, device=device),
    )

    def learn() -> None:
        done = policy.update(views, offsets, batch, credit, GRPO(), minibatch=0)
        assert done.outcome == "stepped", done.outcome

    return lambda: policy.score(views, offsets), learn, n


if __name__ == "__main__":
    main()
