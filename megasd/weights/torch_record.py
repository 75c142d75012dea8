"""One tensor in the bytes of `torch.save`, without the copies that it takes.

A distributed checkpoint is a row of such records in each file. A record is an uncompressed zip
archive: a pickle that says dtype, shape and strides, and the numbers. Here the archive is put
around memory that is already there (`frame`), and found again in a mapped file (`RecordFile`).
"""

import functools
import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

_ALIGNMENT = 64  # of the numbers within the file, as torch.save aligns them within the archive
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
DTYPES = tuple(_STORAGES)
_BY_STORAGE = {storage.__name__: dtype for dtype, storage in _STORAGES.items()}
_DATE = (1 << 5) | 1  # 1980-01-01: the same bytes whenever they are written


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def frame(
    dtype: torch.dtype, shape: Sequence[int], position: int, crc: int = 0
) -> tuple[bytes, bytes]:
    """What stands before and after the numbers of a record at byte `position` of its file.

    `crc` is zlib.crc32 of the numbers, of which there are less than 4 GiB. The lengths do not
    depend on it.
    """
    size = math.prod(shape) * dtype.itemsize
    assert size < 2**32 - 1, f"{shape}: a record holds less than 4 GiB"
    before, directory, count = bytearray(), bytearray(), 0
    small = {"data.pkl": _pickled(dtype, tuple(shape)), "byteorder": b"little", "version": b"3\n"}
    for name, content in (*small.items(), ("data/0", None)):
        path = f"archive/{name}".encode()
        extra = b""
        length, check = (size, crc) if content is None else (len(content), zlib.crc32(content))
        offset = len(before)
        if content is None:  # a field of zeros moves the numbers to where they are aligned
            start = position + offset + 30 + len(path) + 4
            padding = -start % _ALIGNMENT
            extra = struct.pack(f"<2sH{padding}s", b"FB", padding, b"")
        common = struct.pack("<HHHHHIII", 20, 0, 0, 0, _DATE, check, length, length)
        before += b"PK\3\4" + common + struct.pack("<HH", len(path), len(extra)) + path + extra
        before += content or b""
        directory += b"PK\1\2" + struct.pack("<H", 20) + common
        directory += struct.pack("<HHHHHII", len(path), 0, 0, 0, 0, 0, offset) + path
        count += 1
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(before) + size, 0)
    return bytes(before), bytes(directory) + b"PK\5\6" + end


class RecordFile:
    """A file of records, mapped into memory: what is read of it is read when it is used."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Private and writable: torch wants memory that it may write to, nothing ever does.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read(self, offset: int, length: int, *, check: bool) -> Tensor:
        """The tensor of the record there, without a copy: it shares the map's memory.

        `check`: the numbers must have the checksum that stands beside them. Raises ValueError,
        in words that fit after a place's name, when no tensor is there or not the one written.
        """
        try:
            archive = zipfile.ZipFile(_Part(self._map, offset, length))
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            described = _Described(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            dtype, first, shape, stride = described
            numbers = entries["data/0"]
            at = offset + numbers.header_offset
            at += 30 + sum(struct.unpack_from("<HH", self._map, at + 26))
            count = numbers.file_size // dtype.itemsize
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=at)
            whole = flat.as_strided(shape, stride, first)
        except Exception as error:  # zipfile and pickle raise a dozen kinds for damaged bytes
            raise ValueError(f"no tensor of torch.save is there ({error!r})") from error
        if check and numbers.CRC and zlib.crc32(memory_of(flat)) != numbers.CRC:
            raise ValueError("the numbers do not have their checksum")
        return whole


class _Part(io.RawIOBase):
    """Some bytes of a map as a file."""

    def __init__(self, file: mmap.mmap, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError("before the start")  # zipfile looks there for what it may not find
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        start = self.offset + self.position
        buffer[:count] = self.file[start : start + count]
        self.position += count
        return count


class _Storage:
    """Stands for the numbers in a pickle that is written or read."""

    def __init__(self, kind: Any, size: int) -> None:
        self.kind, self.size = kind, size


class _Tensor:
    """Pickles as the tensor of torch.save does."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]) -> None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        storage = _Storage(_STORAGES[dtype], math.prod(shape))
        self.parts = (storage, 0, tuple(shape), tuple(strides), False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, self.parts


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", obj.kind, "0", "cpu", obj.size)
        return None


@functools.cache
def _pickled(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(_Tensor(dtype, shape))
    return out.getvalue()


class _Described(pickle.Unpickler):
    """Reads (dtype, first element, shape, strides) out of a pickled tensor, and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, first, shape, stride, *_: (dtype, first, shape, stride)
        if module == "torch" and name in _BY_STORAGE:
            return _BY_STORAGE[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is none of a plain tensor's parts")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]
