"""Time and memory of the fused vocabulary head against log-softmax on full logits.

    python tools/bench_head.py                          # 8,192 tokens x 512 hidden x 151,936 ids
    python tools/bench_head.py --vocab 32000 --json     # smaller; the last line is one JSON object
    python tools/bench_head.py --hidden 4096            # on a GPU, as wide as an 8B model

Forward and backward of per-token log-probs, gradients of hidden states and weight: float32 on a
CPU, bfloat16 (float32 logits) on a GPU. Every run is a fresh process, the variants take turns,
medians are printed. Memory is the peak during the step over what was in use right before it
(gradients and graph included, inputs not): resident memory on a CPU, allocated memory on a GPU.
`fused+entropy` also differentiates the entropy, which the other two do not. On a busy machine
read the CPU seconds: the time ratio is of wall-clock seconds.

On a GPU `products` is the floor of what keeps no logits: the four products of all tokens with all
ids (the logits, again, and both gradients) in one piece each, in bfloat16, and nothing else. Beside
them stand `scoring`, the forward pass alone, and `divergence`, the jsd over all ids and its
gradients against a teacher of the same size; each as a multiple of its own number of products.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VARIANTS = ("naive", "fused", "fused+entropy")
# On a GPU only: the products of all tokens with all ids that each cannot do without.
PRODUCTS = {"fused": 4, "fused+entropy": 4, "scoring": 1, "divergence": 8}
FLOOR = "products"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk-tokens", type=int, help="model.head_chunk_tokens (its default)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads (torch's own choice)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--measure", choices=(*VARIANTS, *PRODUCTS, FLOOR), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.repeats):
        for variant in VARIANTS:
            runs[variant].append(run_fresh(variant))
        if runs["naive"][0]["device"] != "cpu":
            for variant in (*(PRODUCTS.keys() - VARIANTS), FLOOR):
                runs.setdefault(variant, []).append(run_fresh(variant))
    report(args, runs)


def run_fresh(variant: str) -> dict[str, Any]:
    """One measurement in a process of its own: this one never imports torch."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", variant]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"bench_head: the {variant} run ended with exit code {finished.returncode}")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    import megasd.policy.head.head  # noqa: F401  its pages belong to "before", in every variant

    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        require_memory(args)
    # Loads kernels and starts threads; a GPU also picks its algorithms by size.
    tokens, vocab = (args.tokens, args.vocab) if on_gpu else (64, 1024)
    step(args, *problem(tokens, args.hidden, vocab))
    inputs = problem(args.tokens, args.hidden, args.vocab)
    hidden, weight, _, _ = inputs
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = memory_in_use(on_gpu)
    start, cpu_start = time.perf_counter(), time.process_time()
    logprobs = step(args, *inputs)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    extra = peak_memory(on_gpu) - before
    gradients = [x.grad for x in (hidden, weight) if x.grad is not None]
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in gradients]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_bytes": extra,
        "results": [logprobs.double().mean().item(), *norms],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dtype": str(hidden.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def problem(tokens: int, hidden: int, vocab: int) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """Hidden states, weight, targets and gradients of the log-probs, filled in place."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    states = torch.empty(tokens, hidden, dtype=dtype, device=device).normal_()
    weight = torch.empty(vocab, hidden, dtype=dtype, device=device).normal_(std=hidden**-0.5)
    targets = torch.randint(vocab, (tokens,), device=device)
    upstream = torch.randn(tokens, device=device)
    return states.requires_grad_(), weight.requires_grad_(), targets, upstream


def step(
    args: argparse.Namespace,
    hidden: "Tensor",
    weight: "Tensor",
    targets: "Tensor",
    upstream: "Tensor",
) -> "Tensor":
    import torch

    from megasd.policy.config import ModelConfig
    from megasd.policy.head.divergence import full_divergence
    from megasd.policy.head.head import vocabulary_head

    model = ModelConfig(head_chunk_tokens=args.chunk_tokens)
    chunk_tokens = model.head_chunk_tokens_on(hidden.device.type)
    cut: dict[str, Any] = {"vocab_size": weight.shape[0], "chunk_tokens": chunk_tokens}
    if args.measure == FLOOR:
        with torch.no_grad():
            _ = hidden @ weight.T
            logits = hidden @ weight.T
            hidden.grad, weight.grad = logits @ weight, logits.T @ hidden
        return upstream
    if args.measure == "naive":
        logprobs = torch.log_softmax((hidden @ weight.T).float(), -1)
        logprobs = logprobs.gather(1, targets[:, None]).squeeze(1)
        logprobs.backward(upstream)
        return logprobs.detach()
    if args.measure == "divergence":
        teacher = hidden.detach().flip(0), weight.detach()
        divergence = full_divergence(hidden, weight, *teacher, kind="jsd", **cut)
        divergence.backward(upstream)
        return divergence.detach()
    with torch.set_grad_enabled(args.measure != "scoring"):
        logprobs, entropy, *_ = vocabulary_head(hidden, weight, targets, **cut)
    if args.measure == "scoring":
        return logprobs
    if args.measure == "fused":
        logprobs.backward(upstream)
    else:
        torch.autograd.backward([logprobs, entropy], [upstream, upstream])
    return logprobs.detach()


def memory_in_use(on_gpu: bool) -> int:
    if on_gpu:
        import torch

        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(on_gpu: bool) -> int:
    if on_gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require_memory(args: argparse.Namespace) -> None:
    """Stops before the kernel's out-of-memory killer does: naive holds three full blocks."""
    needed = (3 if args.measure == "naive" else 0.2) * args.tokens * args.vocab * 4
    with open("/proc/meminfo") as lines:
        available = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    if available < needed:
        sys.exit(
            f"bench_head: {args.measure} needs about {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are free; pass a smaller --tokens or --vocab"
        )


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    def median(variant: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[variant])

    about = runs["naive"][0]
    print(
        f"{args.tokens} tokens x {args.hidden} hidden x {args.vocab} ids, {about['dtype']}, "
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, "
        f"median of {args.repeats}"
    )
    print(
        f"{'variant':<14} {'seconds':>9} {'CPU s':>8} {'extra MiB':>10} {'time':>7} {'memory':>7}"
    )
    ratios: dict[str, float] = {}
    summary: dict[str, Any] = {}
    for variant in runs:
        values = {key: median(variant, key) for key in ("seconds", "cpu_seconds", "extra_bytes")}
        seconds, cpu_seconds, extra = values.values()
        times = seconds / median("naive", "seconds")
        memory = extra / median("naive", "extra_bytes")
        print(
            f"{variant:<14} {seconds:>9.3f} {cpu_seconds:>8.2f} {extra / MIB:>10.0f} "
            f"{times:>6.2f}x {memory:>6.3f}x"
        )
        summary[variant] = values
        if variant == "fused":
            ratios = {"memory_ratio": memory, "time_ratio": times}
    if FLOOR in runs:
        product = median(FLOOR, "seconds") / 4
        floors = {name: median(name, "seconds") / n / product for name, n in PRODUCTS.items()}
        ratios |= {f"{name}_floor_ratio": ratio for name, ratio in floors.items()}
        times = ", ".join(f"{name} {ratio:.2f}" for name, ratio in floors.items())
        print(f"times of their products alone: {times}")
    pairs = zip(about["results"], runs["fused"][0]["results"], strict=True)
    difference = max(abs(ours / naive - 1) for naive, ours in pairs)
    print(f"largest relative difference of mean log-prob and gradient norms: {difference:.1e}")
    if args.json:
        sizes = {key: getattr(args, key) for key in ("tokens", "hidden", "vocab", "repeats")}
        machine = {key: about[key] for key in ("device", "dtype", "threads", "torch")}
        print(json.dumps(ratios | sizes | machine | {"difference": difference} | summary))


if __name__ == "__main__":
    main()
