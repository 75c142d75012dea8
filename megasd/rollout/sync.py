"""The trainer's weights to the engines, when they have changed."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from megasd.rollout.engine import RolloutEngine


class Weights(Protocol):
    """What is sent: the policy."""

    version: int

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]: ...


class WeightSync:
    """`send` is called by all ranks; those without an engine take part in the collectives."""

    def __init__(self, engine: RolloutEngine | None, *, feeds_training: bool) -> None:
        self.engine = engine
        self.feeds_training = feeds_training  # False: the engine samples for evaluation only
        self._sent: int | None = None

    def send(self, weights: Weights) -> None:
        """Load the weights into this rank's engine, unless it has this version already."""
        if self._sent == weights.version:
            return
        if self.engine is not None:
            self.engine.load_weights(weights.full_tensors(), weights.version)
        else:
            for _ in weights.full_tensors():
                pass
        self._sent = weights.version
