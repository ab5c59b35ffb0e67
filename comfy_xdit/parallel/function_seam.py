"""Attention that a class calls by a name of its Python module, and not by anything that its caller hands in.

That name is made to lead to a function that asks, in each thread, whether somebody waits for the call. So it is
replaced once in a process, and stays; whatever calls it in a thread where nobody waits goes on to the function that was
there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

Receive = Callable[..., Any]
"""Takes the function that was there, and its arguments."""

_here = threading.local()


def lead_here(module: nn.Module, name: str) -> None:
    """Have calls of `name`, by the Python module of `module`'s class, come to whoever receives them.

    Raises ValueError where it has no function of this name.
    """
    where = sys.modules[type(module).__module__]
    found = getattr(where, name, None)
    if not callable(found):
        raise ValueError(f"{type(module).__name__} calls no {name}; the plan is for another version of it")
    if not isinstance(found, _Led):
        setattr(where, name, _Led(found))


def receive(receiver: Receive | None) -> Receive | None:
    """Who has this thread's calls from now on, None for the functions themselves; the one before is returned."""
    before = getattr(_here, "receiver", None)
    _here.receiver = receiver
    return before


class _Led:
    """In a function's place."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        receiver = getattr(_here, "receiver", None)
        if receiver is None:
            return self._function(*args, **kwargs)
        return receiver(self._function, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)
