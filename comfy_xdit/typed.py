"""Whether values have the types that a dataclass declares for its fields: what a peer sends is not yet trusted."""

from __future__ import annotations

import functools
import math
import types
import typing
from typing import Any


def misfit(kind: type, fields: dict[str, Any]) -> str | None:
    """What is wrong with the first of these fields of `kind` that is not of its type; None when all are.

    Known are plain types, unions, `list[...]` and `dict[str, ...]` of those, and Any. An int does for a float, where
    it is one exactly; a bool is no number; NaN is none either.
    """
    for name, wanted in _types(kind).items():
        if name in fields and not _fits(fields[name], wanted):
            return f"{name} is {_show(fields[name])}, which is no {_name(wanted)}"
    return None


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is Any:
        return True
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if wanted is float:
        return _is_number(value)
    if wanted in (int, bool, str):
        return type(value) is wanted
    return isinstance(value, wanted)


def _is_number(value: Any) -> bool:
    return (type(value) is float and not math.isnan(value)) or (type(value) is int and abs(value) <= 2**53)


def _show(value: Any) -> str:
    return repr(value)[:40] if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def _name(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)
