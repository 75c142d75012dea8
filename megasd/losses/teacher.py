"""What one teacher role says of the batch, as numbers to log."""

import torch

from megasd.losses.quantile import quantile
from megasd.types import PerToken, TokenMask


def teacher_metrics(teacher_gap: PerToken, is_scored: TokenMask) -> dict[str, float]:
    """How much the teacher differs from the student, D = teacher - old log-probs.

    Mean, 95th percentile (linear interpolation) and maximum of |D|, and `reverse_kl`, the k1
    estimate mean(-D) of KL(student, teacher) on tokens that the student sampled, which may be
    negative in a sample: all over the tokens `is_scored`, those of the policy in rollouts that
    the teacher read, and left out when there are none. (k3 would take exp(D), which a teacher
    that knows the answer makes huge.)
    """
    gap = teacher_gap[is_scored]
    if not len(gap):
        return {}
    size = gap.abs()
    return {
        "gap_mean": size.mean(dtype=torch.float64).item(),
        "gap_p95": quantile(size, 0.95),
        "gap_max": size.max().item(),
        "reverse_kl": -gap.mean(dtype=torch.float64).item(),
    }
