"""The GPUs that a plan can be made for, and every figure that the plan assumes about them.

Published peaks are the vendor's: dense bfloat16, not sparse. What a program reaches of them is in
`Assumptions`, one figure each, printed with every plan: none was measured by megasd.
"""

import re
from dataclasses import dataclass

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU of a node of eight, as its vendor describes it."""

    name: str
    memory_bytes: int  # what a program may allocate
    bf16_flops: float  # dense, per second
    fp8_flops: float
    memory_bandwidth: float  # bytes per second
    nvlink_bandwidth: float  # bytes per second and direction, to the other GPUs of the node
    network_bandwidth: float  # bytes per second and direction, to other nodes


def _gpu(name: str, *, gib: float, tflops: float, tb: float, nvlink: float, network: float) -> GPU:
    return GPU(
        name=name,
        memory_bytes=int(gib * GIB),
        bf16_flops=tflops * TERA,
        fp8_flops=2 * tflops * TERA,
        memory_bandwidth=tb * TERA,
        nvlink_bandwidth=nvlink * GB,
        network_bandwidth=network * GB,
    )


# SXM modules; memory as nvidia-smi shows it. One 400 Gb/s network card per GPU.
GPUS = {
    "H100": _gpu("H100", gib=79, tflops=989, tb=3.35, nvlink=450, network=50),
    "H200": _gpu("H200", gib=140, tflops=989, tb=4.8, nvlink=450, network=50),
    "B200": _gpu("B200", gib=178, tflops=2250, tb=7.7, nvlink=900, network=50),
}
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted: all in one place, printed with it, none measured by megasd.

    docs/plan.md says of each figure of speed where it comes from, and what it gives for the steps
    that others published.
    """

    # memory
    context_gib: float = 1.5  # CUDA context, kernels, cuBLAS and cuDNN workspaces
    nccl_gib: float = 2.0  # communicators of the trainer and their buffers
    asleep_engine_gib: float = 3.0  # a sleeping vLLM: its own context, graphs, communicators
    fragmentation: float = 0.06  # share of all that is allocated, lost between blocks
    expert_imbalance: float = 1.5  # tokens of the busiest rank's experts over the mean
    # lengths
    mean_length: float = 0.5  # of prompts and responses, as a share of their maxima
    # speed of the trainer, as shares of the published peak
    train_flops: float = 0.45  # of the update: matrix products, with what stands between them
    score_flops: float = 0.45  # of the forward passes
    expert_flops: float = 0.6  # of the two above, where the products are those of small experts
    float8_flops: float = 0.7  # of the first two, of the float8 peak; experts gain nothing
    packing: float = 0.9  # tokens over places in the micro-batches of a pass
    collectives: float = 0.7  # of NVLink and network bandwidth
    copies: float = 0.6  # of memory bandwidth: sorting, merging, the optimizer
    # speed of the engines
    decode_bandwidth: float = 0.6  # of memory bandwidth, for weights and keys and values
    prefill_flops: float = 0.4
    decode_step_seconds: float = 2.5e-3  # of one token of all sequences: the engine's own Python
    decode_sequence_seconds: float = 10e-6  # the same, for each sequence that runs
    decode_layer_seconds: float = 15e-6  # kernels of one layer; twice as many where it has experts
    all_reduce_seconds: float = 25e-6  # between the GPUs of an engine, before any byte; two a layer
    hf_layer_seconds: float = 150e-6  # kernels of a layer, of transformers' generate
    # speed of a weight sync
    round_seconds: float = 0.0005  # a gather, a merge, a broadcast
    tensor_seconds: float = 250e-6  # the engine's Python for one tensor that it loads
    expert_seconds: float = 20e-6  # and for an expert's, on its way into a stack
    engine_cycle_seconds: float = 2.0  # a colocated engine falls asleep and wakes up
    # beside the GPUs, GB per second
    storage_gb: float = 1.0  # of one node, into the file system of the checkpoints
    host_gb: float = 20.0  # of one GPU, into the memory of its node


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What `--gpus H200:64` names."""

    gpu: GPU
    count: int

    @property
    def nodes(self) -> int:
        return -(-self.count // GPUS_PER_NODE)

    def bandwidth(self, ranks_apart: int) -> float:
        """Of a collective over ranks that span so many consecutive numbers."""
        within = ranks_apart <= GPUS_PER_NODE
        return self.gpu.nvlink_bandwidth if within else self.gpu.network_bandwidth


def parse_gpus(text: str) -> Machine:
    """`H200:64` as a machine; ValueError says how to write it."""
    match = re.fullmatch(r"([A-Za-z]+\d+):(\d+)", text)
    if match is None or match[1].upper() not in GPUS or int(match[2]) < 1:
        raise ValueError(
            f"--gpus {text}: write a type and a number of GPUs, like H200:64; types are "
            + ", ".join(GPUS)
        )
    return Machine(gpu=GPUS[match[1].upper()], count=int(match[2]))


def shown(time: float) -> str:
    """Seconds, or hours where they are many."""
    return f"{time:,.0f} s" if time < 7200 else f"{time / 3600:.1f} h"
