"""A weight that is on the pool, as nodes of ComfyUI's process may look at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten

COPIES = (aten.detach, aten.alias, aten.clone, aten._to_copy, aten.lift_fresh)
"""Copies, casts and moves: of nothing comes nothing."""

FACTORIES = (
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.empty_like, aten.zeros_like),
    *(aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like),
)
"""These ask a weight for its shape, dtype and device only."""


class AbsentWeight(Tensor):
    """A tensor with shape, dtype and device as they would be in ComfyUI's process, but without numbers.

    Samplers make their tensors where the model is and of its type; that works, and takes no memory. Whoever wants
    numbers gets a ValueError: zeros would make a picture that looks right and isn't.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device) -> AbsentWeight:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)  # type: ignore[attr-defined]

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"AbsentWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, kwargs = args[0].device, dict(kwargs or {})
        if func.overloadpacket in COPIES:
            device = kwargs.pop("device", None) or device
            return cls(func(*tree_map(_on_meta, args), **kwargs), device)
        if func.overloadpacket in FACTORIES:
            kwargs["device"] = kwargs.get("device") or device
            return func(*tree_map(_on_meta, args), **kwargs)
        # In inference mode what is made of other operations comes as a whole.
        parts = func.decompose(*args, **kwargs)
        if parts is NotImplemented:
            raise _no_numbers(func.overloadpacket)
        return parts

    def tolist(self) -> Any:
        raise _no_numbers("tolist")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise _no_numbers("numpy")


def _no_numbers(operation: Any) -> ValueError:
    return ValueError(
        f"the weights of this MODEL are on the pool, and a node wants their numbers here ({operation}); "
        "connect it to the MODEL in front of Parallel Model (xDiT)"
    )


def _on_meta(value: Any) -> Any:
    if isinstance(value, AbsentWeight):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def without_numbers(module: torch.nn.Module, device: torch.device) -> None:
    """Have a module that was built on the meta device say that its parameters and buffers are on `device`."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(AbsentWeight(parameter, device), requires_grad=False)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part._buffers[name] = AbsentWeight(buffer, device)
