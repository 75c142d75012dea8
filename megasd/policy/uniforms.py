"""Random numbers by place: a token's are the same whatever else is drawn, by whom and when."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from megasd.types import TokenIndex

# Of SplitMix64 (Steele et al., OOPSLA 2014), as the signed numbers that torch has.
_STEP, _MIX, _MIX_AGAIN = (
    int(np.uint64(word).astype(np.int64))
    for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def uniforms(seed: Sequence[int], tokens: TokenIndex, samples: int) -> Float[Tensor, "N S"]:
    """`samples` numbers in [0, 1) for each of `tokens`, float32, on their device.

    Of the stream of 64-bit words that `seed` names, token t has number t samples and those that
    follow; of a word, the first 24 bits.
    """
    first = np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.int64)
    places = tokens[:, None] * samples + torch.arange(samples, device=tokens.device)
    return _shifted(words(int(first[0]), places), 40).float() * 2.0**-24


def words(first: int, places: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64's words at `places` (from 0) of its stream from `first`, their 64 bits signed."""
    state = first + (places + 1) * _STEP
    state = (state ^ _shifted(state, 30)) * _MIX
    state = (state ^ _shifted(state, 27)) * _MIX_AGAIN
    return state ^ _shifted(state, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
