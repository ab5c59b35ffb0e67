"""Fields of what a peer says, each checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST = 2**53
"""Whole numbers up to here are the same in every reader of JSON."""

MAX_TEXT_CHARS = 1 << 16


class Malformed(ValueError):
    """What a peer said makes no sense; `str(error)` says which field."""


def integer(message: Mapping[str, Any], name: str, *, low: int = 0, high: int = MOST) -> int:
    """The whole number `name`, from `low` to `high`. 1.0 and true are none."""
    value = message.get(name)
    if type(value) is not int or not low <= value <= high:
        raise Malformed(f"{name!r} is no whole number from {low} to {high}")
    return value


def text(message: Mapping[str, Any], name: str, *, max_chars: int = MAX_TEXT_CHARS) -> str:
    """The string `name`, of at most `max_chars` characters."""
    return _text(message.get(name), name, max_chars)


def texts(message: Mapping[str, Any], name: str, *, max_items: int = 1000) -> list[str]:
    """The list of strings `name`; an item may be as long as the line was."""
    value = message.get(name)
    if type(value) is not list or len(value) > max_items:
        raise Malformed(f"{name!r} is no list of at most {max_items} strings")
    return [_text(item, name, MOST) for item in value]


def table(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The JSON object `name`; what is in it is not checked."""
    value = message.get(name)
    if type(value) is not dict:
        raise Malformed(f"{name!r} is no object")
    return value


def named_texts(message: Mapping[str, Any], name: str) -> dict[str, str]:
    """The JSON object `name`, whose values are strings."""
    found = table(message, name)
    return {key: text(found, key) for key in found}


def one_of(message: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    """The string `name`, which is one of `choices`."""
    value = message.get(name)
    if value not in choices or type(value) is not str:
        raise Malformed(f"{name!r} is none of {', '.join(choices)}")
    return value


def _text(value: Any, name: str, max_chars: int) -> str:
    if type(value) is not str or len(value) > max_chars:
        raise Malformed(f"{name!r} is no string of at most {max_chars} characters")
    return value
