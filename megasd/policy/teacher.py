"""The weights that read the privileged context: the policy's own, now or as they were.

They live beside the policy, cut the same way, and take its place for scoring passes only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megasd.policy.config import TeacherConfig
from megasd.policy.megatron.buckets import Bucket


class TeacherWeights:
    """`live`, `snapshot` (a copy every k steps), `ema`, or `frozen` (the initial weights).

    `checkpoint` is a model of its own (policy.py), and nothing is kept here. ema: phi <- decay
    phi + (1 - decay) theta, once per rollout batch after all its optimizer steps; a batch
    without any skips it. Kept in float32, because in bfloat16 a decay of 0.99 would
    round every change away, and cut over the data-parallel ranks like the optimizer's state.
    """

    def __init__(self, config: TeacherConfig, buckets: Sequence[Bucket]) -> None:
        self.config = config
        self.buckets = buckets
        self.kept: list[Tensor] = []  # of each bucket, all of it; ema: this rank's slice
        match config.weights:
            case "ema":
                self.kept = [b.data[b.own].to(torch.float32, copy=True) for b in buckets]
            case "frozen" | "snapshot":
                self.kept = [bucket.data.clone() for bucket in buckets]
            case _:
                pass

    @property
    def stay(self) -> bool:
        """Whether what was in place stays as it is in memory until the batch is done."""
        return self.config.weights in ("frozen", "snapshot")

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By parameter, where they are kept whole."""
        if not self.stay:
            return {}
        pairs = zip(self.buckets, self.kept, strict=True)
        return {name: tensor for bucket, data in pairs for name, _, tensor in bucket.views(data)}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the policy computes with the teacher's weights; collective.

        Nothing is copied: the parameters point elsewhere. What Megatron gathers and steps are the
        buckets, which stay the student's.
        """
        student: list[tuple[torch.nn.Parameter, Tensor]] = []
        try:
            for bucket, kept in zip(self.buckets, self.kept):  # noqa: B905 - live keeps none
                data = bucket.gather(kept) if self.config.weights == "ema" else kept
                for _, parameter, tensor in bucket.views(data):
                    student.append((parameter, parameter.data))
                    parameter.data = tensor
            yield
        finally:
            for parameter, own in student:
                parameter.data = own

    @torch.no_grad()
    def after_batch(self, step: int, *, updated: bool) -> None:
        """Called when all optimizer steps of rollout batch `step` (from 0) are done."""
        pairs = list(zip(self.buckets, self.kept))  # noqa: B905 - live keeps none
        match self.config.weights:
            case "ema" if updated:
                for bucket, phi in pairs:
                    phi.mul_(self.config.decay)
                    phi.add_(bucket.data[bucket.own], alpha=1 - self.config.decay)
            case "snapshot" if (step + 1) % self.config.every == 0:
                for bucket, data in pairs:
                    data.copy_(bucket.data)
            case _:
                pass
