"""What one teacher role says of the batch, as numbers to log."""

import numpy as np

from megasd.types import PerToken, TokenMask


def teacher_metrics(teacher_gap: PerToken, is_scored: TokenMask) -> dict[str, float]:
    """How much the teacher differs from the student, D = teacher - old log-probs.

    Mean, 95th percentile (linear interpolation) and maximum of |D|, and `reverse_kl`, the k1
    estimate mean(-D) of KL(student, teacher) on tokens that the student sampled, which may be
    negative in a sample: all over the tokens `is_scored`, those of the policy in rollouts that
    the teacher read, and left out when there are none. (k3 would take exp(D), which a teacher
    that knows the answer makes huge.)
    """
    if not is_scored.any():
        return {}
    gap = teacher_gap[is_scored].double()
    size = gap.abs()
    return {
        "gap_mean": size.mean().item(),
        # torch.quantile refuses more than 2**24 values; a batch may hold more tokens.
        "gap_p95": float(np.quantile(size.cpu().numpy(), 0.95)),
        "gap_max": size.max().item(),
        "reverse_kl": -gap.mean().item(),
    }
