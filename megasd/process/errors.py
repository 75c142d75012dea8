"""Errors that users read."""


class TryAgainError(RuntimeError):
    """Trouble that may pass, a full disk for instance; the message is a sentence for users.

    The process ends with exit code 1, after which a job is started again; input that cannot be
    used is a ValueError, exit code 2, and is not.
    """
