"""What scoring and updating share: a model on this rank and what it takes to run it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megasd.policy.config import FP8Config
from megasd.policy.float8 import switched_on, tokens_of_a_multiple
from megasd.policy.head.head import HeadOutput, sample_ids, vocabulary_head
from megasd.policy.megatron.build import HeadlessGPT, Layout
from megasd.policy.sequences import Microbatch, pack
from megasd.types import View


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A model that can be read: the policy, or a teacher of its own."""

    layout: Layout
    device: torch.device
    gpt: HeadlessGPT
    vocab_size: int
    max_tokens_per_microbatch: int
    head_chunk_tokens: int
    fp8: FP8Config | None = None

    @property
    def runnable(self) -> torch.nn.Module:
        """What Megatron's schedule runs."""
        return self.gpt

    @property
    def length_multiple(self) -> int:
        """Packed lengths are padded to it: each rank's share is one that its layers can read."""
        layout = self.layout
        return tokens_of_a_multiple(
            self.fp8, tensor=layout.tp_size, sequence=layout.sequence_parallel
        )

    def precision(self, *, backward: bool) -> AbstractContextManager[None]:
        """In which a pass runs: in float8 where `model.fp8` says so of its kind."""
        fp8 = self.fp8
        is_on = fp8 is not None and (fp8.train if backward else fp8.score)
        return switched_on(self.gpt, fp8 if is_on else None)

    def pack(
        self,
        views: Sequence[View | None],
        offsets: np.ndarray,
        keep: Tensor,
        owners: np.ndarray | None = None,
    ) -> list[Microbatch]:
        """This rank's micro-batches of a pass; arguments as of `sequences.pack`.

        Stages of a pipeline know the length of what they send each other: it is one in each pass.
        """
        return pack(
            views,
            offsets,
            keep,
            max_tokens=self.max_tokens_per_microbatch,
            rank=self.layout.dp_rank,
            num_ranks=self.layout.dp_size,
            multiple=self.length_multiple,
            one_length=self.layout.pp_size > 1,
            owners=owners,
            vocab_size=self.vocab_size,
        )

    def read_head(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        *,
        ids: Tensor | None = None,
        top_k: int = 0,
    ) -> HeadOutput:
        """The head's values for final hidden states [n, H], on the last stage."""
        return vocabulary_head(
            hidden,
            self.gpt.head_weight,
            targets,
            ids=ids,
            top_k=top_k,
            vocab_size=self.vocab_size,
            group=self.head_group,
            temperature=temperature,
            chunk_tokens=self.head_chunk_tokens,
        )

    def sample_ids(self, hidden: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
        """Ids [n, S] drawn from each row's next-token distribution."""
        return sample_ids(
            hidden,
            self.gpt.head_weight,
            uniforms,
            vocab_size=self.vocab_size,
            group=self.head_group,
            temperature=temperature,
            chunk_tokens=self.head_chunk_tokens,
        )

    @property
    def head_group(self) -> torch.distributed.ProcessGroup | None:
        return self.layout.tp_group if self.layout.tp_size > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState(ModelState):
    """The policy on this rank. Frozen as a record; the weights inside it learn."""

    ddp: DistributedDataParallel
    optimizer: ChainedOptimizer

    @property
    def runnable(self) -> torch.nn.Module:
        return self.ddp
