"""What a weight sync moves over which link, computed from its plan: nothing is run."""

import math
from dataclasses import dataclass

from megasd.weights.reshard import ReshardPlan, Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that one rank takes in during a walk, by where they come from."""

    rounds: int
    own: int  # its own shards
    tensor_parallel: int  # from the ranks that cut dense parameters with it
    expert_parallel: int  # experts, from the ranks of its expert group
    pipeline: int  # merged buckets, from other stages

    @property
    def total(self) -> int:
        """What it hands to its receiver."""
        return self.own + self.tensor_parallel + self.expert_parallel + self.pipeline


def traffic(plan: ReshardPlan, *, pp: int, stage_rank: int, element_bytes: int = 2) -> Traffic:
    """The traffic of the rank `stage_rank` of pipeline stage `pp`; padding is not counted."""
    rounds = plan.rounds(element_bytes)
    own = tensor_parallel = expert_parallel = pipeline = 0
    for one in rounds:
        full = _full_bytes(plan, one, stage_rank, element_bytes)
        if one.stage != pp:
            pipeline += sum(full.values())
        elif not one.of_experts:
            mine = sum(full.values()) // plan.sizes.tp
            own += mine
            tensor_parallel += sum(full.values()) - mine
        else:
            ep_rank = stage_rank // plan.sizes.etp % plan.sizes.ep
            mine = full.get(ep_rank, 0) // plan.sizes.etp
            own += mine
            expert_parallel += sum(full.values()) - mine
    return Traffic(
        rounds=len(rounds),
        own=own,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        pipeline=pipeline,
    )


def _full_bytes(
    plan: ReshardPlan, one: Round, stage_rank: int, element_bytes: int
) -> dict[int, int]:
    """Bytes of the Hugging Face tensors that the rank has after the round, by ep rank of origin."""
    found: dict[int, int] = {}
    wanted = plan.wanted(stage_rank)
    for unit in one.units:
        for ep_rank in range(plan.sizes.ep if one.of_experts else 1):
            entry = unit.entry(ep_rank, plan.expert_share)
            if entry.expert is not None and entry.expert not in wanted:
                continue
            elements = sum(math.prod(tensor.shape) for tensor in entry.row.hf)
            found[ep_rank] = found.get(ep_rank, 0) + elements * element_bytes
    return found
