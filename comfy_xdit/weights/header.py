"""The header of a safetensors file, read and checked without touching its weights.

Format: 8 bytes of header length (little-endian), the header as JSON, the weights.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from typing import Any

import torch

from comfy_xdit.errors import InputError

LIMIT_BYTES = 32 * 2**20
"""The longest header we read. Real ones stay below 2 MB; parsing takes some twenty times the length."""

METADATA = "__metadata__"
"""The header's entry that is no tensor."""

BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8},
    **{"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8},
    **{"C64": 64, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What weights can be made of, as safetensors and as torch call it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a file: its bytes are begin … end, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str) -> dict[str, TensorInfo]:
    """Every tensor of the file by its key, in the order of the header.

    Raises InputError, in one sentence, for anything that is not a whole and sound safetensors file:
    truncated, hostile sizes, overlaps, other formats. OSError when it can't be opened.
    """
    name = os.path.basename(path)
    start, size, entries = _read(path)
    infos = {key: _entry(name, key, value, start) for key, value in entries.items() if key != METADATA}
    _check_layout(name, infos, size)
    return infos


def read_metadata(path: str) -> dict[str, str]:
    """What the file's maker added as texts; raises as `read_header` does."""
    found = _read(path)[2].get(METADATA)
    return {key: text for key, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


def _read(path: str) -> tuple[int, int, dict[str, Any]]:
    """Where the weights begin, where the file ends, and the header's entries."""
    name = os.path.basename(path)
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{name} is a pipe or a device, not a file; choose a safetensors file")
        size = status.st_size
        start = file.read(8)
        if start[:4] == b"GGUF":
            raise InputError(f"{name} is a GGUF file; use a safetensors file in fp32, fp16, bf16 or plain fp8")
        if start[:4] == b"PK\x03\x04" or start[:2] == b"\x80\x02":
            raise InputError(f"{name} is a pickle of torch.save, which can run code; use a safetensors file")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise InputError(f"{name} is no safetensors file or is cut off: {size} bytes; download it again")
        if length > LIMIT_BYTES:
            raise InputError(f"{name} says its header has {length} bytes; the limit is {LIMIT_BYTES}")
        text = file.read(length)
    return 8 + length, size, _parse(name, text)


def _without_waiting(path: str, flags: int) -> int:
    """A pipe would wait for somebody to write to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _parse(name: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise InputError("a key appears twice")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} has a damaged header ({str(error)[:80]}); download it again") from None
    if not isinstance(entries, dict):
        raise InputError(f"{name} has a damaged header (no table of tensors); download it again")
    return entries


def _entry(name: str, key: str, value: Any, start: int) -> TensorInfo:
    """The checked entry of one tensor. `start` is where the weights begin in the file."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        sound = all(type(n) is int and 0 <= n < 2**62 for n in numbers) and begin <= end and len(shape) <= 16
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{name} has a damaged entry for {key[:80]!r} in its header; download it again")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{name} keeps {key[:80]!r} as {str(dtype)[:20]!r}, which is not a known type of number")
    if math.prod(size for size in shape if size) >= 2**62:
        # Also beside a size of 0, which makes no bytes of it: torch multiplies all of them.
        raise InputError(f"{name}: {key[:80]!r} has a shape that no memory holds; download it again")
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise InputError(f"{name}: {key[:80]!r} has {end - begin} bytes, which is not what its shape takes")
    return TensorInfo(dtype=dtype, shape=shape, begin=start + begin, end=start + end)


def _check_layout(name: str, infos: dict[str, TensorInfo], size: int) -> None:
    """No tensor may reach into another's bytes or beyond the end of the file."""
    reached = 0
    for key, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < reached:
            raise InputError(f"{name}: the bytes of {key[:80]!r} overlap another tensor's; download it again")
        reached = max(reached, info.end)
    if reached > size:
        raise InputError(f"{name} is cut off: {size} of {reached} bytes are there; download it again")
