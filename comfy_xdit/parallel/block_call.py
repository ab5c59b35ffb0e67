"""A block's arguments by the names that a plan uses, however the model passes them."""

from __future__ import annotations

import inspect
from typing import Any


class Call:
    """One call of a forward with `signature`: "x" is an argument, "x.0" the first of several in `x`."""

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bound = signature.bind(*args, **kwargs)
        kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
        self._further: dict[str, Any] = self.bound.arguments.get(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {})

    def _holder(self, name: str) -> dict[str, Any]:
        return self._further if name in self._further else self.bound.arguments

    def named(self) -> dict[str, Any]:
        """Every argument that was given, by its name."""
        return {**{k: v for k, v in self.bound.arguments.items() if v is not self._further}, **self._further}

    def has(self, path: str) -> bool:
        """Whether the argument was given, and has so many items."""
        name, _, item = path.partition(".")
        holder = self._holder(name)
        return name in holder and (not item or int(item) < len(holder[name]))

    def get(self, path: str) -> Any:
        """None where it was not given."""
        if not self.has(path):
            return None
        name, _, item = path.partition(".")
        value = self._holder(name)[name]
        return value[int(item)] if item else value

    def set(self, path: str, value: Any) -> None:
        """The caller's own tuple or list stays as it is."""
        name, _, item = path.partition(".")
        holder = self._holder(name)
        if item:
            items = list(holder[name])
            items[int(item)] = value
            value = type(holder[name])(items)
        holder[name] = value
