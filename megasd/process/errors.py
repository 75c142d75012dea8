"""Errors that users read."""

import errno

# Others (no room, a file server away) pass by themselves.
_LASTING = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV),
    }
)


class TryAgainError(RuntimeError):
    """Trouble that may pass, a full disk for instance; the message is a sentence for users.

    The process ends with exit code 1, after which a job is started again; input that cannot be
    used is a ValueError, exit code 2, and is not. `on_every_rank`: the others raise it too, so that
    one is enough to print it.
    """

    def __init__(self, sentence: str, *, on_every_rank: bool = False) -> None:
        super().__init__(sentence)
        self.on_every_rank = on_every_rank


def may_pass(error: OSError) -> bool:
    """Whether what a file system says can be otherwise when it is asked again."""
    return error.errno is not None and error.errno not in _LASTING
