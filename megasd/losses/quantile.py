"""A quantile of all tokens of a batch, where they are."""

from torch import Tensor


def quantile(values: Tensor, share: float) -> float:
    """The `share`-quantile of `values` [n], n > 0, linear between the two nearest.

    On their device, of as many as there are: torch.quantile refuses more than 2**24, and numpy's
    would have the CPU of every rank sort a batch while its GPU waits.
    """
    place = share * (len(values) - 1)
    below = int(place)
    # All that are not below it, mostly few; of these, the two lowest.
    rest = values.topk(len(values) - below, sorted=False).values
    nearest = rest.topk(min(2, len(rest)), largest=False).values.tolist()
    return nearest[0] + (place - below) * (nearest[-1] - nearest[0])
