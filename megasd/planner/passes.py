"""Seconds of the trainer's passes over a step's rollouts, as the ranks of one stage spend them.

Matrix products at a share of the peak; experts at a smaller one, at the pace of the busiest rank,
with their exchange and the sorting around it; collectives of tensor parallelism. Nothing overlaps.
"""

from dataclasses import dataclass

from megasd.planner.memory import Scenario
from megasd.planner.model import Model
from megasd.planner.sync import far_share

SORTS = 6  # a token's copies are read or written so often around an exchange: sort, again, and back


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Over the rollouts of one replica, forward and perhaps backward."""

    model: Model  # that reads them
    tokens: float
    responses: float  # of them those that the head reads
    length: float  # of a sequence
    forwards: int = 1  # 2: once more while going backward
    backwards: int = 0

    @classmethod
    def over(
        cls,
        scenario: Scenario,
        *,
        extra_tokens: float = 0.0,
        model: Model | None = None,
        forwards: int = 1,
        backwards: int = 0,
    ) -> "Pass":
        """`extra_tokens`: of a sequence, beside its prompt and response."""
        rollouts = scenario.rollouts / scenario.replicas
        length = scenario.mean_prompt + scenario.mean_response + extra_tokens
        return cls(
            model=model or scenario.model,
            tokens=rollouts * length,
            responses=rollouts * scenario.mean_response,
            length=length,
            forwards=forwards,
            backwards=backwards,
        )

    def model_flops(self) -> float:
        """Of a forward pass and its backward pass: what MFU is counted by, nothing twice."""
        model = self.model
        active = model.layers * (model.active_weights + self._attention())
        return 6 * (self.tokens * active + self.responses * model.head_weights)

    def compute_seconds(self, scenario: Scenario) -> float:
        """Of the slowest stage: the last one, whose head reads the responses. The head's backward
        pass computes the logits once more."""
        model, parallel, assumed = self.model, scenario.config.parallel, scenario.assumed
        share = assumed.train_flops if self.backwards else assumed.score_flops
        reached = parallel.tensor * scenario.machine.gpu.bf16_flops * share
        dense = model.attention_weights + (0 if model.experts else model.ffn_weights)
        dense /= self._gain(scenario)
        layer = 2 * self._places(scenario) * (dense + self._attention())
        if model.experts:
            experts = 2 * self._slots(scenario) * model.ffn_weights * parallel.tensor
            layer += experts / assumed.expert_flops
        layers = model.layers / parallel.pipeline * (self.forwards + 2 * self.backwards)
        head = 2 * self.responses * model.head_weights * (1 + 3 * self.backwards)
        return (layers * layer + head) / reached + self._sorting_seconds(scenario)

    def _gain(self, scenario: Scenario) -> float:
        """How much quicker the layers' dense products are for being in float8, on average."""
        fp8, gpu, layers = scenario.config.model.fp8, scenario.machine.gpu, self.model.layers
        if fp8 is None or not (fp8.train if self.backwards else fp8.score):
            return 1.0
        gain = gpu.fp8_flops / gpu.bf16_flops * scenario.assumed.float8_flops
        plain = min(1.0, 2 * fp8.first_last_bf16 / layers)
        return 1 / (plain + (1 - plain) / gain)

    def _attention(self) -> float:
        """The scores and the sum that they weigh, as matrix elements; half of them are masked."""
        return 2 * self.model.heads * self.model.head_dim * self.length / 2

    def _places(self, scenario: Scenario) -> float:
        return self.tokens / scenario.assumed.packing

    def _slots(self, scenario: Scenario) -> float:
        """Copies of tokens, one for each of their experts, on the busiest rank."""
        mine = self._places(scenario) / scenario.config.parallel.tensor
        return mine * self.model.experts_per_token * scenario.assumed.expert_imbalance

    def _sorting_seconds(self, scenario: Scenario) -> float:
        """The copies of tokens, read and written on their way to the experts and back."""
        model, parallel = self.model, scenario.config.parallel
        if not model.experts:
            return 0.0
        layers = model.layers / parallel.pipeline * (self.forwards + self.backwards)
        moved = SORTS * self._slots(scenario) * model.hidden * scenario.dtype_bytes
        bandwidth = scenario.machine.gpu.memory_bandwidth * scenario.assumed.copies
        return layers * moved / bandwidth

    def communication_seconds(self, scenario: Scenario) -> float:
        """Of one stage's ranks."""
        model, parallel, machine = self.model, scenario.config.parallel, scenario.machine
        layers, tp = model.layers / parallel.pipeline, parallel.tensor
        rows = self._places(scenario) * model.hidden * scenario.dtype_bytes
        seconds = 0.0
        if tp > 1:  # gathered and scattered around each of a layer's two blocks; experts exchange
            blocks = 1 if model.experts else 2
            moves = blocks * (2 * self.forwards + 3 * self.backwards)
            moved = moves * layers * rows * (tp - 1) / tp
            seconds += moved / (machine.bandwidth(tp) * scenario.assumed.collectives)
        if model.experts:
            seconds += layers * self._exchange_seconds(scenario)
        if parallel.pipeline > 1:
            apart = machine.count // parallel.pipeline + 1
            sent = rows / (tp if parallel.sequence else 1) * (self.forwards + self.backwards)
            seconds += sent / (machine.bandwidth(apart) * scenario.assumed.collectives)
        return seconds

    def _exchange_seconds(self, scenario: Scenario) -> float:
        """To the ranks of a layer's experts and back, in each direction of the pass."""
        parallel, gpu = scenario.config.parallel, scenario.machine.gpu
        ranks = parallel.expert * parallel.ranks_per_expert
        if ranks == 1:
            return 0.0
        copies = self._slots(scenario) * parallel.ranks_per_expert
        moved = 2 * (self.forwards + self.backwards) * copies * (ranks - 1) / ranks
        moved *= self.model.hidden * scenario.dtype_bytes / scenario.assumed.collectives
        far = far_share(ranks)
        return moved * ((1 - far) / gpu.nvlink_bandwidth + far / gpu.network_bandwidth)
