"""A stop that the cluster asks for: SIGUSR1 to the ranks, heeded by all of them after a step.

The signal is blocked and looked for among the pending ones, not handled: Slurm sends it to every
process of a step, and a blocked signal stays blocked in the workers that a rank starts, where an
uncaught one would end them.
"""

import signal

EXIT_CODE = 85  # a checkpoint is saved and the run is not done: start it again


def listen() -> None:
    """Called before anything starts a thread: threads have the mask of the one that made them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    # A job script ignores the signal until here; ignored signals do not stay pending.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def is_asked() -> bool:
    """True once this process was sent the signal."""
    return signal.SIGUSR1 in signal.sigpending()


def is_asked_anywhere() -> bool:
    """The same answer on every rank: whether any of them was sent the signal. A collective."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    asked = torch.tensor(int(is_asked()), device=device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    return bool(asked)
