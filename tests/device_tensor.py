"""A tensor on a CUDA device that isn't there, and the calls that torch would not let it have.

torch's bindings take hold of the device before they dispatch, in a few methods: a build without CUDA then has no guard
for it and raises. Those methods are written again here, and ask for the same operations past the bindings.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class DeviceTensor(torch.Tensor):
    """A tensor on a CUDA device; `meta` has its shape and its strides.

    numbers: those of a small tensor that the host made, or that was computed from such; None: unknown.
    """

    meta: Tensor
    numbers: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made.meta, made.numbers = meta, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor whose device is gone")

    def __getitem__(self, index: Any) -> Tensor:
        return indexed(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        items = index if isinstance(index, tuple) else (index,)
        assert not any(isinstance(item, (Tensor, list)) for item in items), "a write at places that a tensor names"
        part = indexed(self, index)
        if isinstance(value, Tensor):
            part.copy_(value)
        else:
            part.fill_(value)

    def __invert__(self) -> Tensor:
        return self.bitwise_not()

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return aten.copy_.default(self, source, non_blocking)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        is_so = self.is_contiguous(memory_format=memory_format)
        return self if is_so else self.clone(memory_format=memory_format)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = numbered(self.device, args, kwargs)
        return torch.Tensor.to(self, *args, **kwargs)

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        made = torch.tensor(data, dtype=dtype or self.dtype)
        return made.to(self.device if device is None else device)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        assert not as_tuple
        return aten.nonzero.default(self)

    def as_subclass(self, kind: type) -> Any:
        return self

    def item(self) -> bool | int | float:
        return aten._local_scalar_dense.default(self)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise AssertionError("numpy of a tensor on a GPU")

    def untyped_storage(self) -> Any:
        """What asks for a storage wants to tell storages apart and to know how large they are."""
        storage = self.meta.untyped_storage()
        return SimpleNamespace(data_ptr=lambda: storage._cdata, nbytes=storage.nbytes)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


class Calls(TorchFunctionMode):
    """The same for what no method of a `DeviceTensor` is asked for. device: the card of this rank."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        past = PAST_BINDINGS.get(func)
        if past is None:
            return func(*args, **(kwargs or {}))
        return past(self, *args, **(kwargs or {}))

    def to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = numbered(self._device, args, kwargs)
        return x.to(*args, **kwargs)

    def made(self, data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        """torch.tensor and torch.as_tensor: on the host first, then a copy."""
        made = data if isinstance(data, Tensor) else torch.tensor(data, dtype=dtype, **options)
        return self.to(made, device=made.device if device is None else device, dtype=dtype or made.dtype)


PAST_BINDINGS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: Calls.to,
    torch.tensor: Calls.made,
    torch.as_tensor: Calls.made,
}


Given = tuple[tuple[Any, ...], dict[str, Any]]


def numbered(device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The arguments of `to` with `device` for a "cuda" without a number."""

    def number(x: Any) -> Any:
        is_bare = isinstance(x, (str, torch.device)) and torch.device(x) == torch.device("cuda")
        return device if is_bare else x

    return tuple(map(number, args)), {name: number(value) for name, value in kwargs.items()}


def indexed(x: Tensor, index: Any) -> Tensor:
    """`x[index]` for numbers, slices, None, …, and one tensor of numbers or list."""
    items = list(index) if isinstance(index, tuple) else [index]
    place = next((number for number, item in enumerate(items) if item is Ellipsis), None)
    if place is not None:
        used = sum(item is not None and item is not Ellipsis for item in items)
        items[place : place + 1] = [slice(None)] * (x.dim() - used)
    dim = 0
    for item in items:
        if item is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(item, slice):
            if item != slice(None):
                x = aten.slice.Tensor(x, dim, item.start, item.stop, item.step or 1)
            dim += 1
        elif isinstance(item, (Tensor, list)):
            named = torch.as_tensor(item)
            x, dim = aten.index.Tensor(x, [None] * dim + [named]), dim + named.dim()
        else:
            x = x.select(dim, int(item))
    return x.view(x.shape)
