"""What running the host's sampler moves, put back when the run was only an attempt.

A sampler draws from torch's generators, and perhaps from one of its own; it counts its steps, or remembers
tensors. After an attempt that comes to nothing the run that follows has to find all of it as it was.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_xdit_nodes.trace import NotAProgram
from torch import Tensor

MAX_OBJECTS = 10_000
"""With more to look through and to put back, each run takes noticeably longer to begin."""

LEFT_ALONE = (Tensor, torch.nn.Module, ModelPatcher, types.ModuleType, type, str, bytes, int, float, complex)


@contextlib.contextmanager
def as_it_was(device: torch.device, *roots: Any) -> Iterator[Moved]:
    """After an error, what the block moved is where it was before.

    That is: torch's, Python's and NumPy's own random generators, those of the sampler's that are found, and the
    plain state of objects that can be reached from `roots`. Raises NotAProgram, before the block, when these are too
    many.
    """
    moved = Moved(device, roots)
    try:
        yield moved
    except BaseException:
        moved.put_back()
        raise


class Moved:
    """The state of random generators and of objects, as it was when they were first met."""

    def __init__(self, device: torch.device, roots: Iterable[Any]) -> None:
        self._undo: list[Callable[[], object]] = []
        self._known: dict[int, Any] = {}
        self._keep(torch.get_rng_state, torch.set_rng_state)
        if device.type == "cuda":
            self._keep(lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device))
        self._keep(random.getstate, random.setstate)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            self._keep(numpy.random.get_state, numpy.random.set_state)
        waiting = list(roots)
        while waiting:
            waiting += self._meet(waiting.pop())
            if len(self._known) > MAX_OBJECTS:
                raise NotAProgram(
                    f"the sampler reaches more than {MAX_OBJECTS} objects, too many to put back after an attempt"
                )

    def meet(self, generator: torch.Generator) -> None:
        """To be called before a generator is drawn from, wherever it was kept."""
        self._meet(generator)

    def put_back(self) -> None:
        """Everything, to where it was."""
        for undo in self._undo:
            undo()

    def _keep(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self._undo.append(functools.partial(put, get()))

    def _meet(self, thing: Any) -> list[Any]:
        """Keep the state of `thing`; what there is to look at beyond it."""
        if thing is None or id(thing) in self._known or isinstance(thing, LEFT_ALONE):
            return []
        self._known[id(thing)] = thing  # Held, so that no other object takes its id.
        if isinstance(thing, torch.Generator):
            self._keep(thing.get_state, thing.set_state)
            return []
        if isinstance(thing, random.Random):
            self._keep(thing.getstate, thing.setstate)
            return []
        if type(thing).__module__.startswith("numpy.random"):
            return self._meet_numpy(thing)
        if isinstance(thing, types.FunctionType):
            return self._meet_function(thing)
        if isinstance(thing, types.MethodType):
            return [thing.__self__, thing.__func__]
        if isinstance(thing, functools.partial):
            return [thing.func, *thing.args, *thing.keywords.values()]
        if isinstance(thing, tuple):
            return list(thing)
        if isinstance(thing, list):
            return self._meet_list(thing)
        found = self._meet_dict(thing) if isinstance(thing, dict) else []
        state = getattr(thing, "__dict__", None)
        return found + (self._meet_dict(state) if isinstance(state, dict) else [])

    def _meet_numpy(self, thing: Any) -> list[Any]:
        if hasattr(thing, "get_state"):
            self._keep(thing.get_state, thing.set_state)
        elif hasattr(thing, "bit_generator"):
            bits = thing.bit_generator
            self._keep(lambda: bits.state, lambda state: setattr(bits, "state", state))
        return []

    def _meet_function(self, function: types.FunctionType) -> list[Any]:
        cells = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # Not filled yet.
                cells.append(cell.cell_contents)
                self._keep(lambda cell=cell: cell.cell_contents, functools.partial(setattr, cell, "cell_contents"))
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        # Of a module's names only what draws: all else there is shared by everybody.
        drawing = [value for value in named if isinstance(value, (torch.Generator, random.Random))]
        drawing += [value for value in named if type(value).__module__.startswith("numpy.random")]
        return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *drawing]

    def _meet_list(self, thing: list[Any]) -> list[Any]:
        before = list(thing)

        def put() -> None:
            if not _same(thing, before):
                thing[:] = before

        self._undo.append(put)
        return before

    def _meet_dict(self, thing: dict[Any, Any]) -> list[Any]:
        before = dict(thing)

        def put() -> None:
            if thing.keys() != before.keys() or not _same(list(thing.values()), [before[key] for key in thing]):
                thing.clear()
                thing.update(before)

        self._undo.append(put)
        return list(before.values())


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
