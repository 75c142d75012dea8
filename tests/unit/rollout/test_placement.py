"""Which rank has which engine, and what a probe says when one computes something else."""

from typing import Any

import numpy as np
import pytest

from megasd.planner.presets import preset
from megasd.rollout.config import RolloutConfig, VLLMConfig
from megasd.rollout.placement import Gpu, Seat, check_gpus, expert_receivers, seats
from megasd.rollout.probe import gap, probe_sequences
from megasd.types import Prompt
from megasd.weights.layout import Sizes
from megasd.weights.reshard import ReshardPlan
from megasd.weights.tables import table_for
from megasd.weights.traffic import traffic


def config(engine: str = "vllm", **vllm: object) -> RolloutConfig:
    return RolloutConfig(engine=engine, vllm=VLLMConfig(**vllm))  # pyright: ignore


def placed(
    one: RolloutConfig, world_size: int, *, stages: int = 1, on_cpu: bool = False
) -> tuple[dict[int, Seat], int]:
    """Seats, and over how many ranks the engines cut their experts. A replica has two ranks."""
    ranks = {"ranks_per_stage": world_size // stages, "world_size": world_size}
    starts = list(range(0, world_size, 2))
    found = seats(one, replica_starts=starts, is_cuda=not on_cpu, **ranks)
    return found, expert_receivers(one, is_cuda=not on_cpu, **ranks)


def test_on_cpus_the_first_rank_of_each_replica_has_an_engine() -> None:
    for one in (config("hf"), config(tensor=2)):
        assert placed(one, 6, on_cpu=True) == ({0: Seat(0), 2: Seat(1), 4: Seat(2)}, 1)


def test_on_gpus_consecutive_ranks_share_an_engine_and_perhaps_its_experts() -> None:
    found, receivers = placed(config(tensor=2), 4)
    assert found == {0: Seat(0, 0, 2), 1: Seat(0, 1, 2), 2: Seat(1, 0, 2), 3: Seat(1, 1, 2)}
    assert [seat.is_owner for seat in found.values()] == [True, False, True, False]
    assert receivers == 1
    assert placed(config(tensor=4, expert_parallel=True), 4)[1] == 4


@pytest.mark.parametrize(
    ("vllm", "world_size", "stages"),
    [
        ({"engines": 3, "tensor": 8}, 16, 1),  # every worker takes in the whole model
        ({"engines": 3, "tensor": 8, "expert_parallel": True}, 16, 1),  # more workers than ranks
        ({"engines": 3, "tensor": 4, "expert_parallel": True}, 16, 8),  # a stage has two ranks
    ],
)
def test_engines_on_servers_are_fed_by_one_rank_each_where_more_would_not_help_or_fit(
    vllm: dict[str, Any], world_size: int, stages: int
) -> None:
    found = placed(config(placement="server", **vllm), world_size, stages=stages)
    assert found == ({0: Seat(0), 5: Seat(1), 10: Seat(2)}, 1)


def test_workers_that_share_experts_on_servers_have_a_rank_each_of_one_stage() -> None:
    one = config(placement="server", engines=3, tensor=4, expert_parallel=True)
    found, receivers = placed(one, 16, stages=2)
    assert found == {
        start + rank: Seat(number, rank, 4)
        for number, start in enumerate((0, 4, 8))
        for rank in range(4)
    }
    assert receivers == 4


def test_what_ranks_send_to_a_server_is_each_workers_own_experts() -> None:
    """235B-A22B into an engine of 8 GPUs: 470 GB from one rank, or 73 from each of eight."""
    table, sizes = table_for(preset("235B-A22B")), Sizes(tp=4, pp=2, ep=8)
    sent = {}
    for shares in (False, True):
        one = config(placement="server", engines=2, tensor=8, expert_parallel=shares)
        seating, receivers = placed(one, 64, stages=2)
        plan = ReshardPlan(table, sizes, receivers=receivers)
        for rank, seat in seating.items():
            stage, stage_rank = divmod(rank, 32)
            share = 128 // seat.size
            mine = range(seat.rank * share, (seat.rank + 1) * share)
            assert plan.wanted(stage_rank) == mine, "as vLLM shares them out"
            sent[shares] = traffic(plan, pp=stage, stage_rank=stage_rank).total
    assert sent == {False: pytest.approx(470.2e9, rel=1e-3), True: pytest.approx(72.8e9, rel=1e-3)}


def test_gpus_that_an_engine_could_not_share_are_refused_with_what_to_do() -> None:
    seating = {rank: Seat(rank // 2, rank % 2, 2) for rank in range(4)}
    there = [Gpu("n1", f"u{i}", f"{i}") for i in range(4)]
    check_gpus(seating, there)
    check_gpus(seating, [*there[:2], Gpu("n2", "u0", "0"), Gpu("n2", "u1", "1")])
    bound = [Gpu("n1", f"u{i}", "0") for i in range(4)]
    with pytest.raises(ValueError, match=r"ranks 0 and 1 of node n1 .* only, as number 0: .*bind"):
        check_gpus(seating, bound)
    check_gpus({rank: Seat(rank) for rank in range(4)}, bound)
    with pytest.raises(ValueError, match="ranks 1 and 3 run on one GPU, u1 of node n1"):
        check_gpus(seating, [*there[:3], there[1]])
    apart = [there[0], Gpu("n2", "u0", "1"), *there[2:]]
    with pytest.raises(
        ValueError, match="ranks 0 and 1 share an engine and are on nodes n1 and n2"
    ):
        check_gpus(seating, apart)


def test_a_probe_is_the_first_prompts_cut_short() -> None:
    prompts = [
        Prompt(index=i, messages=(), token_ids=np.arange(length))
        for i, length in enumerate([5, 1, 1000, *[7] * 30])
    ]
    assert [len(ids) for ids in probe_sequences(prompts)] == [5, 256, *[7] * 14]


def test_a_gap_is_the_mean_distance_and_names_the_worst_tokens() -> None:
    sequences = [np.array([3, 4, 5]), np.array([6, 7])]
    trainer = [np.array([-1.0, -2.0]), np.array([-3.0])]
    engine = [np.array([-1.5, -2.0]), np.array([-2.0])]
    found = gap(sequences, engine, trainer, show=2)
    assert found.mean == pytest.approx(0.5)
    assert found.worst == (
        "token 7 (place 1 of probe 1): engine -2.0000, trainer -3.0000; "
        "token 4 (place 1 of probe 0): engine -1.5000, trainer -1.0000"
    )
    engine[0][1] = np.nan
    found = gap(sequences, engine, trainer, show=1)
    assert found.mean == np.inf
    assert found.worst.startswith("token 5 (place 2 of probe 0): engine nan")
