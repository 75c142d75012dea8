"""Config section of the verifiers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardConfig:
    """`reward:` how verifiers are run. Each answer is judged in a process that can be killed."""

    workers: int = 4  # processes per rank that samples
    timeout_seconds: float = 20.0  # per rollout; then the worker is killed, the rollout an error
    success_threshold: float = 1.0  # a rollout is correct where its reward reaches this
    binary: bool = False  # 1 where correct, 0 elsewhere, whatever the verifier's partial credit
