"""A safetensors file mapped into memory: its pages are shared by all the processes that map it."""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.weights.header import FLOATS, TensorInfo, read_header


class MappedFile:
    """The tensors of one file, as views of the map; nothing is read before it is used.

    The map is private: what is written to a view stays in this process. The file must not be
    shortened while it is mapped: touching a page that is gone kills the process.
    Raises as `read_header` does.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = read_header(path)
        size = os.path.getsize(path)
        storage = torch.UntypedStorage.from_file(path, shared=False, nbytes=size)
        self._storage = cast(torch.UntypedStorage, storage)

    def tensor(self, key: str) -> Tensor:
        """The tensor as the file has it: a view, or a copy where its bytes are not aligned to its dtype.

        Raises InputError when it is not made of floating-point numbers.
        """
        info = self.infos[key]
        if info.dtype not in FLOATS:
            raise InputError(f"{key} is kept as {info.dtype}, which is a quantised layout; use plain fp8 or more")
        dtype = FLOATS[info.dtype]
        num_bytes = info.end - info.begin
        if info.begin % dtype.itemsize:
            raw = torch.empty(0, dtype=torch.uint8).set_(self._storage, info.begin, (num_bytes,), (1,))
            return raw.clone().view(dtype).reshape(info.shape)
        flat = torch.empty(0, dtype=dtype).set_(
            self._storage, info.begin // dtype.itemsize, (num_bytes // dtype.itemsize,), (1,)
        )
        return flat.view(info.shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in the map, not in memory of its own."""
        return tensor.untyped_storage().data_ptr() == self._storage.data_ptr()
