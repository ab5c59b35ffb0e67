"""Tensors on their way between two processes of one machine: a few bytes inside the message, or one sealed memfd.

All tensors of a message lie in one memfd, whatever their number, and all ranks map the same one. It is sealed before
it leaves: nobody can cut it short, which would be a SIGBUS to who reads it, nor write to it. A receiver's mapping is
private, so that it may write to its tensors; the pages that it writes to become its own.
memfd needs no room in /dev/shm, which is 64 MiB in a container by default.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import json
import mmap
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .descriptor import Descriptor

INLINE_BYTES = 1 << 16
"""Up to so many bytes of tensors, a copy through the socket is faster than a memfd."""

ALIGNMENT = 64
"""Of each tensor's first byte: a cache line, and enough for any dtype."""

MAX_WRITE_BYTES = 1 << 30
"""write(2) takes at most 2 GiB at a time."""

# Of Linux' fcntl.h; Python has names for them, but not in each build.
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FAILED = ctypes.c_void_p(-1).value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parcel:
    """Tensors, packed. table: JSON, a dtype and a shape for each. num_bytes: of all of them, as they lie there.

    They are in `inline`, or in `memory`, then `inline` is empty.
    """

    table: bytes
    num_bytes: int
    inline: bytes
    memory: Descriptor | None


def pack(tensors: list[Tensor]) -> Parcel:
    """Tensors on the CPU, contiguous. Raises MemoryError when there is no room, ValueError for what can't travel."""
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"a {tensor.layout} tensor on {tensor.device} can't travel; send a contiguous one on cpu")
    rows = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    slots = list(_slots(rows))
    num_bytes = slots[-1].end if slots else 0
    table = json.dumps(rows).encode()
    if num_bytes <= INLINE_BYTES:
        whole = bytearray(num_bytes)
        for tensor, slot in zip(tensors, slots, strict=True):
            whole[slot.start : slot.end] = _bytes_of(tensor)
        return Parcel(table=table, num_bytes=num_bytes, inline=bytes(whole), memory=None)
    try:
        memory = _sealed(tensors, slots, num_bytes)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes for a message: {error.strerror}") from None
    return Parcel(table=table, num_bytes=num_bytes, inline=b"", memory=memory)


def unpack(parcel: Parcel) -> list[Tensor]:
    """The tensors, which keep what they lie in alive.

    Raises ValueError when they don't fit, or the memory isn't sealed; OSError when it can't be mapped.
    """
    try:
        rows = json.loads(parcel.table)
        slots = list(_slots(rows))
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"malformed table of tensors ({error})") from None
    num_bytes = slots[-1].end if slots else 0
    if num_bytes != parcel.num_bytes:
        raise ValueError(f"tensors of {num_bytes} bytes in a message of {parcel.num_bytes}")
    buffer: Any = bytearray(parcel.inline) if parcel.memory is None else _mapped(parcel.memory.fd, num_bytes)
    if len(buffer) != num_bytes:
        raise ValueError(f"tensors of {num_bytes} bytes in {len(buffer)}")
    return [_tensor(buffer, slot) for slot in slots]


@dataclasses.dataclass(frozen=True)
class _Slot:
    start: int
    end: int
    dtype: torch.dtype
    shape: list[int]


def _slots(rows: Any) -> Iterator[_Slot]:
    """Where each tensor of a table lies."""
    end = 0
    for name, shape in rows:
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name!r} is no dtype")
        num_bytes = dtype.itemsize
        for length in shape:
            if type(length) is not int or length < 0:
                raise ValueError(f"{length!r} is no length of a tensor")
            num_bytes *= length
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + num_bytes
        yield _Slot(start, end, dtype, shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Its memory, without numpy, which has no name for torch's own dtypes. Valid as long as the tensor lives."""
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(tensor.data_ptr())).cast("B")


def _tensor(buffer: Any, slot: _Slot) -> Tensor:
    if slot.start == slot.end:
        return torch.empty(slot.shape, dtype=slot.dtype)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, offset=slot.start, count=slot.end - slot.start)
    return raw.view(slot.dtype).reshape(slot.shape)


def _sealed(tensors: list[Tensor], slots: list[_Slot], num_bytes: int) -> Descriptor:
    memory = Descriptor(os.memfd_create("comfy-xdit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(memory.fd, num_bytes)
    for tensor, slot in zip(tensors, slots, strict=True):
        # Written, not mapped: where memory ends this is an error, and not a signal.
        rest, offset = _bytes_of(tensor), slot.start
        while rest:
            written = os.pwrite(memory.fd, rest[:MAX_WRITE_BYTES], offset)
            rest, offset = rest[written:], offset + written
    fcntl.fcntl(memory.fd, F_ADD_SEALS, SEALS)
    return memory


def _mapped(fd: int, num_bytes: int) -> Any:
    """The memory as an array of bytes; it is unmapped with the last tensor in it."""
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:
        raise ValueError("a descriptor that is no memfd") from None
    if seals & SEALS != SEALS:
        raise ValueError("a memfd that isn't sealed")
    if os.fstat(fd).st_size != num_bytes:
        raise ValueError(f"a memfd of {os.fstat(fd).st_size} bytes, not {num_bytes}")
    # Not Python's mmap: it keeps a descriptor open, and thousands of held results would be thousands of them.
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0)
    if address == MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    array = (ctypes.c_ubyte * num_bytes).from_address(address)
    # At exit the kernel does it; tensors may live longer than this.
    weakref.finalize(array, _libc.munmap, address, num_bytes).atexit = False
    return array
