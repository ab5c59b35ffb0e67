"""What comes out of weights that are cut over the tensor axis is added up, or joined along its channels."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .block_call import Call
from .context import Axis
from .paths import find
from .sequence import join, total
from .tensor_plan import TensorPlan


@contextlib.contextmanager
def sharded(module: nn.Module, plan: TensorPlan | None, axis: Axis) -> Iterator[None]:
    """`module`, which holds this rank's shards of its weights, gives what whole ones would give inside of the `with`.

    Every rank of the axis calls it alike. plan: None for a family that is never cut.
    """
    if plan is None or axis.degree == 1:
        yield
        return
    handles, norms = [], [child for child in _each(module, plan.norms) if isinstance(child, nn.RMSNorm)]
    for child in _each(module, plan.rows):
        handles.append(child.register_forward_hook(lambda module, args, out: total(out, axis)))
    for child in _each(module, plan.joined):
        if hasattr(child, "out_features"):
            handles.append(child.register_forward_hook(lambda module, args, out: _channels(out, axis)))
    for pattern, arguments in plan.per_head.items():
        for child in _each(module, (pattern,)):
            handles.append(child.register_forward_pre_hook(_own_heads(child, arguments, axis), with_kwargs=True))
    for norm in norms:
        norm.forward = _norm_over_ranks(norm, axis)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            del norm.forward


def _each(module: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    return [child for pattern in patterns for _, child in find(module, pattern)]


def _channels(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' channels, of which each has as many."""
    return join(x, x.dim() - 1, x.shape[-1] * axis.degree, axis).contiguous()


def _norm_over_ranks(norm: nn.RMSNorm, axis: Axis) -> Callable[[Tensor], Tensor]:
    """The forward of a norm over all ranks' channels, of which this one has some, and their weights."""
    eps = norm.eps
    assert eps is not None, "torch's own choice differs between its versions"

    def forward(x: Tensor) -> Tensor:
        # As torch computes it: in fp32 at least, and rounded once.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = total(wide.square().sum(-1, keepdim=True), axis)
        normed = wide * torch.rsqrt(squares / (x.shape[-1] * axis.degree) + eps)
        return (normed if norm.weight is None else normed * norm.weight.to(x.dtype)).to(x.dtype)

    return forward


def _own_heads(module: nn.Module, arguments: dict[str, int], axis: Axis) -> Callable[..., Any]:
    """A hook that narrows arguments with an entry for each head, which the model makes for all of them."""
    signature = inspect.signature(module.forward)

    def narrow(value: Any, dim: int) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(narrow(item, dim) for item in value)
        if not isinstance(value, Tensor) or value.shape[dim] == 1:
            return value
        num = value.shape[dim] // axis.degree
        return value.narrow(dim, axis.index * num, num).contiguous()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(signature, args, kwargs)
        for name, dim in arguments.items():
            if call.has(name):
                call.set(name, narrow(call.get(name), dim))
        return call.bound.args, call.bound.kwargs

    return hook
