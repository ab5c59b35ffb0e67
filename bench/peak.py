"""How many bytes a piece of work holds at its worst moment."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorPeak(TorchDispatchMode):
    """Counts the bytes of tensors made inside the `with` block; `peak_bytes` is their highest sum.

    The same on every run, unlike the resident set: no scratch memory of kernels, no allocator's
    caches. Tensors that were there before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id_ for id_ in map(_storage_id, tree_leaves((args, kwargs))) if id_ is not None}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            id_ = _storage_id(leaf)
            if id_ is None or id_ in before or id_ in self._live:
                continue
            storage = leaf.untyped_storage()
            self._live[id_] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, id_, None).atexit = False
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))
        return out


def _storage_id(leaf: Any) -> int | None:
    if not isinstance(leaf, Tensor) or leaf.device.type == "meta":
        return None
    return leaf.untyped_storage()._cdata


class ResidentPeak:
    """The process's highest resident set inside the `with` block, above where it stood: `peak_bytes`.

    Linux only: the high-water mark is reset through /proc/self/clear_refs (proc(5)).
    """

    def __init__(self) -> None:
        self.peak_bytes = 0

    def __enter__(self) -> ResidentPeak:
        Path("/proc/self/clear_refs").write_text("5")
        self._start = _status_kb("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peak_bytes = max(0, _status_kb("VmHWM") - self._start) * 1024


def _status_kb(field: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/{os.getpid()}/status has no {field}; measure on Linux")
