"""A port that strangers may knock on: scanners, browsers, whoever dialled a wrong number.

Both sides prove that they know a key before a byte of theirs is unpickled. Each caller is heard in
a thread of its own and for a few seconds only, so that one who says nothing keeps nobody waiting.
"""

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

GREETING_SECONDS = 20.0  # for both proofs; a loaded machine takes its time
CALLERS = 64  # heard at the same time: for one more, the one who has been silent longest must go

Address = tuple[str, int] | str


class Door:
    """Listens from now on; hands each caller who knows the key to `welcome`, in any thread."""

    def __init__(
        self, host: str | None, key: bytes, welcome: Callable[[Connection], None], *, port: int = 0
    ) -> None:
        """`host` None: for this machine only, at a name that is no file and ends with us."""
        self._key, self._welcome = key, welcome
        self._callers: deque[Connection] = deque()
        self._lock = threading.Lock()
        self._is_open = True
        if host is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(f"\0megasd-{os.getpid()}-{os.urandom(8).hex()}")
        else:
            self._socket = socket.create_server((host, port))
        self._socket.listen(CALLERS)
        threading.Thread(target=self._serve, name="megasd-door", daemon=True).start()

    @property
    def address(self) -> Address:
        """As `call` takes it; plain values."""
        name: Any = self._socket.getsockname()
        return name.decode() if isinstance(name, bytes) else name

    def _serve(self) -> None:
        while self._is_open:
            try:
                caller, _ = self._socket.accept()
            except OSError:  # gone again before it was heard, or out of file descriptors
                time.sleep(0.05)
                continue
            connection = Connection(caller.detach())
            with self._lock:
                if len(self._callers) == CALLERS:
                    hang_up(self._callers[0])
                self._callers.append(connection)
            threading.Thread(target=self._hear, args=[connection], daemon=True).start()

    def _hear(self, connection: Connection) -> None:
        knows = _greet(connection, self._key, answers=False)
        with self._lock:
            self._callers.remove(connection)
            knows = knows and self._is_open
        if knows:
            self._welcome(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Who was let in stays."""
        with self._lock:
            self._is_open = False
            for connection in self._callers:
                hang_up(connection)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a caller
        self._socket.close()


def call(address: Address, key: bytes, seconds: float = GREETING_SECONDS) -> Connection:
    """To a door that knows the same key. Raises OSError where none opens in time."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as caller:
        caller.settimeout(seconds)
        caller.connect(address)
        caller.settimeout(None)
        connection = Connection(caller.detach())
    if not _greet(connection, key, answers=True, seconds=seconds):
        connection.close()
        raise ConnectionRefusedError(f"whoever listens at {address} does not know the key")
    return connection


def _greet(
    connection: Connection, key: bytes, *, answers: bool, seconds: float = GREETING_SECONDS
) -> bool:
    """Whether the other side knows the key, and has said so in time."""
    is_late = threading.Event()
    late = threading.Timer(seconds, lambda: (is_late.set(), hang_up(connection)))
    late.daemon = True
    late.start()
    prove: list[Callable[..., None]] = [deliver_challenge, answer_challenge]
    try:
        for step in reversed(prove) if answers else prove:
            step(connection, key)
    except Exception:  # whatever it was that a stranger sent
        return False
    finally:
        late.cancel()
    return not is_late.is_set()


def hang_up(connection: Connection) -> None:
    """Ends a connection that another thread reads: that thread sees its end and closes it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
