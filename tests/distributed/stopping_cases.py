"""What ranks run for the tests of stopping."""

import signal
import time
from collections.abc import Sequence

import torch.distributed as dist

from megasd.process import interrupt
from megasd.rollout.spread import Spread


def stop_one(asked: int, working: int) -> str | None:
    """Rank `asked` is sent the signal while rank `working` samples for all."""

    def sample(share: Sequence[int]) -> Sequence[int]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            interrupt.raise_if_asked()
            time.sleep(0.01)
        return share

    rank = dist.get_rank()
    interrupt._state = interrupt._State()
    interrupt.share(dist.distributed_c10d._get_default_store())
    try:
        with interrupt.heeded_by_the_loop():
            interrupt.raise_if_asked_anywhere()
            if rank == asked:
                interrupt._take(signal.SIGTERM)
            Spread(0 if rank == working else None, 1).map([1, 2, 3], sample)
    except interrupt.StopError:
        agreed = interrupt.asked_anywhere()
        return None if agreed is None else agreed.name
    finally:
        interrupt._state = interrupt._State()
    return "not stopped"
