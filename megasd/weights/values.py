"""Whether the numbers of a tensor can be those of a model."""

import torch
from torch import Tensor

LARGEST = 65504.0  # of float16, in which models are published and run


def strange_values(tensor: Tensor) -> str | None:
    """What no weight of a model is; None where there is nothing of it. Waits for the device."""
    low, high = torch.stack(tensor.aminmax()).double().tolist()
    if low != low or high != high:
        return "holds NaN"
    extreme = max(low, high, key=abs)
    if abs(extreme) > LARGEST:
        return "holds infinity" if abs(extreme) == torch.inf else f"holds {extreme:.3g}"
    return None
