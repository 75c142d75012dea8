"""What a weight sync of large models would move over which link, computed from the plan.

    python tools/show_sync_plan.py          # the tables of megasd/docs/sync.md

Nothing is run and nothing is measured: bytes and rounds come from the plan that a sync executes,
seconds from them and the bandwidths that are printed with them.
"""

from dataclasses import dataclass
from typing import Any

from megasd.testing.hollow import SIZES
from megasd.weights.layout import Sizes
from megasd.weights.reshard import ReshardPlan
from megasd.weights.tables import table_for
from megasd.weights.traffic import Traffic, traffic

GB = 1e9
GPUS_PER_NODE = 8
# Per GPU and direction, as collectives on H100 nodes reach them; all are assumptions.
NVLINK, NETWORK, MEMORY = 300 * GB, 40 * GB, 2000 * GB
ROUND_SECONDS = 0.0005  # launching a gather, a merge, a broadcast and a hand-over


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    gpus: int
    sizes: Sizes
    rollout: int  # GPUs of one engine
    receivers: int  # over which the engine shares its experts; 1: each GPU takes all


CASES = [
    Case(model="30B-A3B", gpus=8, sizes=Sizes(tp=2, ep=8), rollout=2, receivers=1),
    Case(model="30B-A3B", gpus=8, sizes=Sizes(tp=2, ep=8), rollout=8, receivers=8),
    Case(model="30B-A3B", gpus=32, sizes=Sizes(tp=2, pp=2, ep=8), rollout=8, receivers=8),
    Case(model="30B-A3B", gpus=64, sizes=Sizes(tp=2, pp=2, ep=8), rollout=8, receivers=8),
    Case(model="235B-A22B", gpus=32, sizes=Sizes(tp=4, pp=2, ep=16), rollout=16, receivers=16),
    Case(model="235B-A22B", gpus=64, sizes=Sizes(tp=4, pp=2, ep=32), rollout=8, receivers=8),
    Case(model="235B-A22B", gpus=64, sizes=Sizes(tp=4, pp=2, ep=32), rollout=32, receivers=32),
]


def main() -> None:
    print(
        f"NVLink {NVLINK / GB:.0f} GB/s, network {NETWORK / GB:.0f} GB/s, memory "
        f"{MEMORY / GB:.0f} GB/s per GPU, {1e3 * ROUND_SECONDS:.1f} ms per round\n"
    )
    columns = "| model | GPUs | trainer | engine | rounds | own | TP | EP | PP | handed over | s |"
    print(columns)
    print("| --- | ---: | --- | --- | " + "---: | " * 7)
    for case in CASES:
        print(row(case))


def row(case: Case) -> str:
    """The rank with the most to take in."""
    stage_size = case.gpus // case.sizes.pp
    plan = ReshardPlan(table_for(config_of(case.model)), case.sizes, receivers=case.receivers)
    found = max(
        (
            traffic(plan, pp=pp, stage_rank=rank)
            for pp in range(case.sizes.pp)
            for rank in range(0, stage_size, max(1, stage_size // 8))
        ),
        key=lambda one: seconds(one, case),
    )
    cut, shares = case.sizes, "shared" if case.receivers > 1 else "whole"
    trainer = f"TP{cut.tp} PP{cut.pp} EP{cut.ep}"
    bytes_by_link = (found.own, found.tensor_parallel, found.expert_parallel, found.pipeline)
    numbers = " | ".join(f"{value / GB:.2f}" for value in (*bytes_by_link, found.total))
    return (
        f"| {case.model} | {case.gpus} | {trainer} | TP{case.rollout}, experts {shares} | "
        f"{found.rounds} | {numbers} | {seconds(found, case):.2f} |"
    )


def seconds(found: Traffic, case: Case) -> float:
    """One link after the other, nothing overlapped: gather, merge, broadcast, take over."""
    crosses = case.sizes.ep * case.sizes.etp > GPUS_PER_NODE
    far = 1 - GPUS_PER_NODE / (case.sizes.ep * case.sizes.etp) if crosses else 0.0
    near_seconds = (found.tensor_parallel + found.expert_parallel * (1 - far)) / NVLINK
    far_seconds = found.expert_parallel * far / NETWORK
    stages_far = case.gpus // case.sizes.pp >= GPUS_PER_NODE
    pipeline_seconds = found.pipeline / (NETWORK if stages_far else NVLINK)
    copies = 2 * (found.total - found.pipeline) + 2 * found.total  # merge; the engine's own copy
    return (
        near_seconds
        + far_seconds
        + pipeline_seconds
        + copies / MEMORY
        + found.rounds * ROUND_SECONDS
    )


def config_of(model: str) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "vocab_size": 151_936,
        "num_experts": 128,
        "attention_bias": False,
        **SIZES[model],
    }


if __name__ == "__main__":
    main()
