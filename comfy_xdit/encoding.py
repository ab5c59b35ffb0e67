"""How a message travels: as a JSON text and a list of tensors. No pickled object of ours ever does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .typed import misfit

Tree = Any
"""None, bool, int, float, str, Tensor, and lists and str-keyed dicts of those."""

KINDS: dict[str, type[Any]] = {}
"""The registry: name on the wire → class. Nothing else is ever made of what a peer sends."""


def register(kind: type) -> None:
    """Let the dataclass `kind` travel under its name. Every subclass of Message is registered so by itself."""
    known = KINDS.get(kind.__name__, kind)
    assert known.__module__ == kind.__module__, f"{known.__module__} has a message {kind.__name__} too"
    KINDS[kind.__name__] = kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """Base of everything on the wire."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        register(cls)


def encode(message: Message) -> tuple[str, list[Tensor]]:
    """The message as a JSON text and the tensors it refers to (on the CPU, detached, contiguous)."""
    tensors: list[Tensor] = []
    return json.dumps(_packed(message, tensors)), tensors


# Not closures in `encode` and `decode`: one that calls itself is a cycle, and Python's collector might come for a job's
# tensors only much later.


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """`value` as JSON knows it; its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        # A plain Tensor: Parameters and subclasses pickle through classes that the other side refuses.
        tensors.append(value.detach().as_subclass(Tensor).cpu().contiguous())
        return {"$tensor": len(tensors) - 1}
    kind = KINDS.get(type(value).__name__)
    if kind is not None and isinstance(value, kind):
        fields = {f.name: _packed(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
        return {"$": kind.__name__, **fields}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise TypeError(f"a message cannot carry the dict key {key!r}; use plain strings")
        return {key: _packed(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a message cannot carry a {type(value).__name__}; use tensors, numbers and text")


def decode(text: str, tensors: list[Tensor]) -> Message:
    """The message that `encode` made. Raises InputError for all else: unknown kinds and fields, wrong types."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise InputError("malformed message: something other than a tensor among its tensors")
    try:
        message = _unpacked(json.loads(text), tensors)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"malformed message: {error}") from None
    if not isinstance(message, Message):
        raise InputError(f"malformed message: {type(message).__name__} is no message")
    return message


def _unpacked(value: Any, tensors: list[Tensor]) -> Any:
    """What `_packed` was given."""
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[_index(value["$tensor"], len(tensors))]
    if "$" not in value:
        return {key: _unpacked(item, tensors) for key, item in value.items()}
    kind = KINDS.get(value["$"]) if isinstance(value["$"], str) else None
    if kind is None:
        raise InputError(f"unknown message {value['$']!r}; the two sides run different versions")
    fields = {name: _unpacked(item, tensors) for name, item in value.items() if name != "$"}
    if wrong := misfit(kind, fields):
        raise InputError(f"malformed {kind.__name__}: {wrong}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise InputError(f"malformed {kind.__name__}: {error}") from None


def _index(value: Any, length: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < length:
        raise InputError(f"malformed message: tensor {value!r} of {length}")
    return value
