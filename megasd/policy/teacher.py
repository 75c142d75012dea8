"""The weights that read the privileged context: the policy's own, now or as they were.

They live beside the policy, cut the same way, and are swapped in for a scoring pass only.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megasd.policy.config import TeacherConfig


class TeacherWeights:
    """`live`, `snapshot` (a copy every k steps), `ema`, or `frozen` (the initial weights).

    `checkpoint` is a model of its own (policy.py), and nothing is kept here. ema: phi <- decay
    phi + (1 - decay) theta, once per rollout batch after all its optimizer steps; a batch
    without any skips it. Kept in float32, because in bfloat16 a decay of 0.99 would
    round every change away.
    """

    def __init__(self, config: TeacherConfig, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.config = config
        self._live = parameters
        self.tensors: dict[str, Tensor] = {}
        if config.weights not in ("live", "checkpoint"):
            dtype = torch.float32 if config.weights == "ema" else None
            self.tensors = {
                name: parameter.detach().to(dtype or parameter.dtype, copy=True)
                for name, parameter in parameters.items()
            }

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the policy computes with the teacher's weights."""
        if not self.tensors:
            yield
            return
        student = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        try:
            self._write(self.tensors)
            yield
        finally:
            self._write(student)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def after_batch(self, step: int, *, updated: bool) -> None:
        """Called when all optimizer steps of rollout batch `step` (from 0) are done."""
        match self.config.weights:
            case "ema" if updated:
                for name, parameter in self._live.items():
                    phi = self.tensors[name]
                    phi.mul_(self.config.decay).add_(parameter.float(), alpha=1 - self.config.decay)
            case "snapshot" if (step + 1) % self.config.every == 0:
                for name, parameter in self._live.items():
                    self.tensors[name].copy_(parameter)
            case _:
                pass
