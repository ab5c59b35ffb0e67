"""The shapes that torch's operations give, without numbers and without a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from device_tensor import DeviceTensor
from torch import Tensor


@cache
def name_of(func: Any) -> str:
    """As torch has it in `aten`."""
    return func._schema.name.removeprefix("aten::")


@cache
def is_view(func: Any) -> bool:
    """Whether the operation gives another view of its tensor, for which nothing is launched."""
    return any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)


SHAPES: dict[Any, Any] = {}
"""Operation and what it was given → what it gave: torch's shape functions take long, and a model's blocks are alike."""


def shaped(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation gives, on the meta device."""
    is_new = not is_view(func) and not func._schema.is_mutable
    key = (func, signature(args), signature(kwargs)) if is_new else None
    if key in SHAPES:
        return mapped(_made_like, SHAPES[key])
    made = func(*mapped(_meta_of, args), **mapped(_meta_of, kwargs))
    if key is not None:
        SHAPES[key] = mapped(lambda x: x.to("meta") if isinstance(x, Tensor) else x, made)
    return made


def _made_like(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def signature(tree: Any) -> Any:
    """What the shapes of a result depend on."""
    if isinstance(tree, dict):
        return tuple((key, signature(item)) for key, item in tree.items())
    if isinstance(tree, (tuple, list)):
        return tuple(map(signature, tree))
    if isinstance(tree, Tensor):
        return (tree.shape, tree.stride(), tree.dtype, tree.device.type)
    return (type(tree), tree)


def leaves(tree: Any) -> list[Any]:
    """What is in the tuples, lists and dicts. (torch's own walk takes half of the time of a run.)"""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if not isinstance(tree, (tuple, list)):
        return [tree]
    found: list[Any] = []
    for item in tree:
        if isinstance(item, (tuple, list, dict)):
            found += leaves(item)
        else:
            found.append(item)
    return found


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tuples, lists and dicts with `function` of what is in them."""
    if isinstance(tree, dict):
        return {key: mapped(function, item) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        made = [mapped(function, item) for item in tree]
        return made if isinstance(tree, list) else tuple(made)
    return function(tree)


def _meta_of(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.meta
    if isinstance(x, torch.device):
        return torch.device("meta")
    return x.to("meta") if isinstance(x, Tensor) else x
