"""The endless stream of prompts, whose whole state is one position."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megasd.types import Prompt


class Prompts:
    """Prompts epoch after epoch, each epoch in its own order.

    The order is a pure function of (seed, epoch, number of rows), so the state is the number of
    prompts handed out so far: a resumed stream continues exactly where it stopped, also in the
    middle of an epoch. A batch may cross the end of an epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("data.files: there are no prompts to draw from.")
        self.rows = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = fingerprint(prompts)
        self._order = (-1, np.empty(0, dtype=np.int64))  # (epoch, its permutation)
        self.position = 0  # prompts handed out since the start of the run

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> float:
        """Epochs handed out so far, as a fraction."""
        return self.position / len(self.rows)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        drawn = [self._at(self.position + offset) for offset in range(count)]
        self.position += count
        return drawn

    def _at(self, position: int) -> Prompt:
        epoch, row = divmod(position, len(self.rows))
        if not self._shuffle:
            return self.rows[row]
        if self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, generator.permutation(len(self.rows)))
        return self.rows[self._order[1][row]]

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "rows": len(self.rows),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`. Raises a ValueError if the data are not the ones of `state`."""
        if (state["rows"], state["fingerprint"]) != (len(self.rows), self._fingerprint):
            raise ValueError(
                f"data.files: the checkpoint was made with other data ({state['rows']} rows then, "
                f"{len(self.rows)} now, or the same number with other content); resume with "
                "the data and the tokenizer of the run, or start a new run."
            )
        self.position = state["position"]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A digest of what the prompts ask and expect, in order; paths and metadata are left out."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(prompt.token_ids.tobytes())
        digest.update(repr((prompt.answer, prompt.solution, prompt.verifier)).encode())
    return digest.hexdigest()
