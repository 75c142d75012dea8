"""What a weight sync of large models would move over which link, computed from the plan.

    python tools/show_sync_plan.py          # the tables of megasd/docs/sync.md

Nothing is run and nothing is measured: bytes and rounds come from the plan that a sync executes,
seconds from them and the bandwidths that are printed with them.
"""

from dataclasses import dataclass

from megasd.planner.hardware import GB
from megasd.planner.presets import preset
from megasd.planner.sync import Links, sync_seconds
from megasd.weights.layout import Sizes
from megasd.weights.reshard import ReshardPlan
from megasd.weights.tables import table_for
from megasd.weights.traffic import Traffic, traffic

# As collectives on H100 nodes reach them; all are assumptions.
LINKS = Links(nvlink=300 * GB, network=40 * GB, memory=2000 * GB, round_seconds=0.0005)


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
    Case(model="235B-A22B", gpus=32, sizes=Sizes(tp=4, pp=2, ep=16), rollout=8, receivers=8),
    Case(model="235B-A22B", gpus=64, sizes=Sizes(tp=4, pp=2, ep=32), rollout=8, receivers=8),
    Case(model="235B-A22B", gpus=64, sizes=Sizes(tp=4, pp=2, ep=8), rollout=8, receivers=8),
]


def main() -> None:
    print(
        f"NVLink {LINKS.nvlink / GB:.0f} GB/s, network {LINKS.network / GB:.0f} GB/s, memory "
        f"{LINKS.memory / GB:.0f} GB/s per GPU, {1e3 * LINKS.round_seconds:.1f} ms per round\n"
    )
    columns = "| model | GPUs | trainer | engine | rounds | own | TP | EP | PP | handed over | s |"
    print(columns)
    print("| --- | ---: | --- | --- | " + "---: | " * 7)
    for case in CASES:
        print(row(case))


def row(case: Case) -> str:
    """The rank with the most to take in."""
    stage_size = case.gpus // case.sizes.pp
    plan = ReshardPlan(table_for(preset(case.model)), case.sizes, receivers=case.receivers)
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
    return sync_seconds(found, case.sizes, case.gpus, LINKS)


if __name__ == "__main__":
    main()
