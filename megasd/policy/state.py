"""What scoring and updating share: the model on this rank and what it takes to run it."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megasd.policy import forward
from megasd.policy.build import HeadlessGPT, Layout
from megasd.policy.head import HeadOutput
from megasd.policy.sequences import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState:
    """The policy on this rank. Frozen as a record; the weights inside it learn."""

    layout: Layout
    device: torch.device
    gpt: HeadlessGPT
    ddp: DistributedDataParallel
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    vocab_size: int
    max_tokens_per_microbatch: int
    head_chunk_tokens: int

    @property
    def length_multiple(self) -> int:
        """Packed lengths are padded to it: sequence parallelism cuts them evenly."""
        return self.layout.tp_size if self.layout.sequence_parallel else 1

    def read_head(self, hidden: Tensor, microbatch: Microbatch, temperature: float) -> HeadOutput:
        return forward.read_head(
            hidden,
            self.gpt,
            microbatch,
            self.layout,
            vocab_size=self.vocab_size,
            temperature=temperature,
            chunk_tokens=self.head_chunk_tokens,
        )
