"""NCCL without torch's process group: a broadcast from one place to others, which may die.

A ProcessGroupNCCL has a watchdog that ends the process when a collective fails. What it notes of a
failure is shared by all groups, and the default group's monitor acts on it minutes later, whatever
TORCH_NCCL_ASYNC_ERROR_HANDLING says of this group. The trainer has to live on without an engine:
so these are the library's own calls, and nobody watches them but who waits here.

Not yet run on a GPU.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ID_BYTES = 128
_UINT8 = 1  # ncclUint8
_IN_PROGRESS = 7  # ncclInProgress


class NCCLError(RuntimeError):
    """What the library says of a call, or of a peer."""


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


def library() -> Any:
    """The one that torch has loaded."""
    found: Any = ctypes.CDLL("libnccl.so.2")
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    found.ncclGetUniqueId.argtypes = [ctypes.POINTER(UniqueId)]
    found.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), number, UniqueId, number]
    found.ncclBroadcast.argtypes = [pointer, pointer, size, number, number, pointer, pointer]
    found.ncclCommGetAsyncError.argtypes = [pointer, ctypes.POINTER(number)]
    found.ncclCommAbort.argtypes = [pointer]
    found.ncclGetErrorString.argtypes = [number]
    found.ncclGetErrorString.restype = ctypes.c_char_p
    return found


def unique_id(nccl: Any = None) -> bytes:
    """For all places of one communicator."""
    nccl, made = nccl or library(), UniqueId()
    _check(nccl, nccl.ncclGetUniqueId(ctypes.byref(made)))
    return bytes(made)


class Communicator:
    """`Waits` are how long and for what: an iterator that raises when it is enough."""

    def __init__(
        self,
        unique: bytes,
        place: int,
        size: int,
        device: torch.device,
        waits: Callable[[], Any],
        nccl: Any = None,
    ) -> None:
        """Collective with the other places; place 0 sends."""
        self._nccl = nccl or library()
        self._device, self._comm = device, ctypes.c_void_p()
        self._stream = torch.cuda.Stream(device)
        trouble: list[BaseException] = []

        def join() -> None:
            try:
                torch.cuda.set_device(device)
                identity = UniqueId.from_buffer_copy(unique)
                made = self._nccl.ncclCommInitRank(ctypes.byref(self._comm), size, identity, place)
                _check(self._nccl, made)
                # The first collective connects, and blocks meanwhile.
                self._launch(torch.zeros(1, dtype=torch.uint8, device=device)).synchronize()
            except BaseException as error:
                trouble.append(error)

        # A peer that never comes is waited for in the library: by a thread that may be left there.
        thread = threading.Thread(target=join, name="megasd-nccl", daemon=True)
        thread.start()
        try:
            for _ in waits():
                if not thread.is_alive():
                    break
        except BaseException:
            self.abort()
            raise
        if trouble:
            raise NCCLError(f"no NCCL communicator: {trouble[0]}") from trouble[0]

    def broadcast(self, raw: Tensor, waits: Callable[[], Any]) -> None:
        """Bytes from place 0 to all; returns when they are there, or have left."""
        done, said = self._launch(raw), ctypes.c_int()
        for _ in waits():
            if done.query():
                return
            _check(self._nccl, self._nccl.ncclCommGetAsyncError(self._comm, ctypes.byref(said)))
            if said.value != _IN_PROGRESS:
                _check(self._nccl, said.value)

    def _launch(self, raw: Tensor) -> Any:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            here, stream = raw.data_ptr(), self._stream.cuda_stream
            sent = self._nccl.ncclBroadcast(here, here, raw.numel(), _UINT8, 0, self._comm, stream)
            _check(self._nccl, sent)
            return self._stream.record_event()  # for the host to look at

    def abort(self) -> None:
        """Whatever it is doing. By a thread: a peer that died may be waited for even here."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm.value is not None:
            threading.Thread(target=self._nccl.ncclCommAbort, args=[comm], daemon=True).start()


def _check(nccl: Any, result: int) -> None:
    if result != 0:
        words = f"result {result}"
        with contextlib.suppress(Exception):
            words = nccl.ncclGetErrorString(result).decode()
        raise NCCLError(f"NCCL: {words}")
