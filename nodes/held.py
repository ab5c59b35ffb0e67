"""Conditioning is the same at every step: it goes to the workers once."""

from __future__ import annotations

import collections
import uuid
from collections.abc import Callable

import torch
from torch import Tensor

from comfy_xdit.messages import Held

SMALL = 1024
"""Elements up to which a tensor travels with every call: a round trip costs more than its bytes."""

LIMIT = 32
"""Tensors held per argument at most. Regional prompts use several; more come from a node that changes
its conditioning at every step, and then the oldest one makes room."""


class Constants:
    """Replaces tensors by references to what the workers hold already.

    hold(name, tensor) and drop(names) send to the workers. Compared by content: ComfyUI concatenates
    cond and uncond anew at every step, so identity says nothing.
    """

    def __init__(self, *, hold: Callable[[str, Tensor], None], drop: Callable[[list[str]], None]) -> None:
        self._hold = hold
        self._drop = drop
        self._run = uuid.uuid4().hex[:12]
        self._count = 0
        self._known: dict[str, collections.OrderedDict[str, Tensor]] = {}

    def refer(self, argument: str, value: Tensor) -> Held | Tensor:
        """A reference to `value`, sent to the workers now if they don't hold it; small tensors themselves."""
        if value.numel() <= SMALL:
            return value
        known = self._known.setdefault(argument, collections.OrderedDict())
        for name, tensor in known.items():
            if _alike(tensor, value) and torch.equal(tensor, value):
                return Held(name=name)
        if len(known) >= LIMIT:
            oldest, _ = known.popitem(last=False)
            self._drop([oldest])
        self._count += 1
        name = f"{self._run}/{argument}/{self._count}"
        self._hold(name, value)
        # A copy: a node may change its tensor in place, and the workers would not see it.
        known[name] = value.clone()
        return Held(name=name)

    def clear(self) -> None:
        """Drop all of it on the workers."""
        names = [name for known in self._known.values() for name in known]
        self._known.clear()
        if names:
            self._drop(names)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
