"""A file's fingerprint: whether two machines have the same model at the same path, without reading all of it."""

from __future__ import annotations

import functools
import hashlib
import os

from .header import read_header

SAMPLE_BYTES = 64
"""Of each tensor's start and middle. A page of the disk is read for each; finetunes change nearly every number."""

NUM_SAMPLES = 4096
"""Of a file whose tensors aren't known here."""


def fingerprint(path: str) -> str:
    """Of a safetensors file: its header, and a few numbers of every tensor. Of a GGUF file: bytes all over it.

    Raises as `read_header` does.
    """
    status = os.stat(path)
    return _fingerprint(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _fingerprint(path: str, size: int, changed_ns: int) -> str:
    """size, changed_ns: so that another file at the same path is read anew."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        if path.lower().endswith(".gguf"):
            for number in range(NUM_SAMPLES):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, number * size // NUM_SAMPLES))
            return digest.hexdigest()
        infos = read_header(path)
        for key, info in infos.items():
            digest.update(f"{key} {info.dtype} {info.shape} ".encode())
            for begin in (info.begin, (info.begin + info.end) // 2):
                digest.update(os.pread(file.fileno(), min(SAMPLE_BYTES, info.end - begin), begin))
    return digest.hexdigest()
