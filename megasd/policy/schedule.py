"""The learning rate of each optimizer step, from this run's configuration and the step alone."""

import math

from megasd.policy.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, *, total_steps: int) -> float:
    """Of optimizer step `step`, counted from 1, of a run of `total_steps`.

    Step k of the warm-up runs at lr k / warmup_steps. The decay begins at lr with the first step
    behind it and would reach `min_lr` one step after the last: no step's rollouts are spent on a
    rate of 0. Nothing of it is remembered, so a run that is resumed with more steps decays over
    all of them.
    """
    warmup = optimizer.warmup_steps
    if step <= warmup:
        return optimizer.lr * step / warmup
    done = min(1.0, (step - 1 - warmup) / max(1, total_steps - warmup))
    match optimizer.schedule:
        case "constant":
            return optimizer.lr
        case "linear":
            left = 1.0 - done
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left
