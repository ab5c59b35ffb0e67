"""Calls of ComfyUI's own transformers, as `messages.Denoise` brings them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import Tuple


def rows_of(name: str, value: Any, rows: range, batch: int) -> Any:
    """Some rows of an argument: a tensor with an entry for each row or one for all, or several of them.

    Raises InputError, naming the argument, for a tensor with other numbers of entries.
    """
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] == 1 != batch:
            return value
        if value.shape[0] != batch:
            raise InputError(f"{name} has {value.shape[0]} rows for a batch of {batch}; use 1 or {batch}")
        return value[rows.start : rows.stop]
    if isinstance(value, Tuple):
        return Tuple(items=[rows_of(name, item, rows, batch) for item in value.items])
    if isinstance(value, list):
        return [rows_of(name, item, rows, batch) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"{name} is a {type(value).__name__}, whose rows are not known; remove the node that gives it")


class Apart(Exception):
    """Values that can't go together."""


def joined(values: list[Any], rows: int) -> Any:
    """One argument of several calls, of so many rows each, as that of one call; raises Apart where shapes differ."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise Apart
    if isinstance(first, Tensor):
        if first.dim() == 0 or any(value.shape != first.shape for value in values):
            raise Apart
        return torch.cat([value.expand(rows, *value.shape[1:]) for value in values])
    if isinstance(first, Tuple):
        return Tuple(items=joined([value.items for value in values], rows))
    if isinstance(first, list):
        if any(len(value) != len(first) for value in values):
            raise Apart
        return [joined(list(items), rows) for items in zip(*values, strict=True)]
    if not all(alike(value, first) for value in values):
        raise Apart
    return first


def alike(a: Any, b: Any) -> bool:
    """Whether two arguments are the same, to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Tuple):
        return alike(a.items, b.items)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    return bool(a == b)


def as_given(value: Any) -> Any:
    """`value` with each `Tuple` made Python's: some models ask whether a timestep is one. Lists and dicts are new."""
    if isinstance(value, Tuple):
        return tuple(as_given(item) for item in value.items)
    if isinstance(value, list):
        return [as_given(item) for item in value]
    if isinstance(value, dict):
        return {key: as_given(item) for key, item in value.items()}
    return value


def as_sent(value: Any) -> Any:
    """`value` with each tuple made a `Tuple`, as a message has it."""
    if isinstance(value, tuple):
        return Tuple(items=[as_sent(item) for item in value])
    if isinstance(value, list):
        return [as_sent(item) for item in value]
    return value


def packed(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """A transformer's output; several latents as ComfyUI's samplers see them: in one row, [rows, 1, numbers]."""
    if isinstance(output, Tensor):
        return output
    return torch.cat([part.reshape(part.shape[0], 1, -1) for part in output], -1)


def shapes_of(x: list[Tensor]) -> list[list[int]]:
    """Of a row of several latents."""
    return [list(part.shape[1:]) for part in x]


def unpacked(output: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    """The latents of which `packed` made `output`; shapes: of a row of each."""
    parts = output.split([math.prod(shape) for shape in shapes], -1)
    return [part.reshape(part.shape[0], *shape) for part, shape in zip(parts, shapes, strict=True)]
