"""One process that is all of its world.

MEGASD_TEST_LAYERS=local: with Megatron's own layers where Transformer Engine is installed too.
"""

import gc
import os
from typing import Any


def join_alone(device: str) -> Any:
    """The backend, whoever in this process asked before; the policy of the test before is gone."""
    import torch.distributed as dist

    from megasd.policy import backend
    from megasd.testing.ranks import forget_model_parallel

    os.environ.pop("RANK", None)
    layers: Any = os.environ.get("MEGASD_TEST_LAYERS", "auto")
    started = backend.start(device, layers=layers)
    if not dist.is_initialized():
        backend.join_ranks(started, timeout_seconds=60)
    forget_model_parallel()
    gc.collect()
    return started
