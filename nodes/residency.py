"""Where a model or VAE of ours is resident, and how the workers' memory is freed again."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy_xdit import messages as m
from comfy_xdit.pool.errors import PoolError

if TYPE_CHECKING:
    from comfy_xdit.pool.client import Pool

log = logging.getLogger("comfy_xdit")

UNLOAD_PATIENCE_S = 10.0
"""How long freeing waits for another client's job: ComfyUI runs nothing else meanwhile."""


EXIT_PATIENCE_S = 2.0
"""The same when ComfyUI ends."""


class Residency:
    """The pools that hold one model or VAE, under which key each.

    what: "model" or "VAE", for the log.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._held: dict[str, tuple[Pool, str]] = {}
        self._told: dict[str, tuple[str, str]] = {}
        """Of each pool that was busy: the key, and what the log says already."""
        self._pid = os.getpid()

    def add(self, pool: Pool, key: str) -> None:
        """To be called before it is loaded: a load that fails half-way leaves something too."""
        self._held[pool.name] = (pool, key)

    def __bool__(self) -> bool:
        """Whether a pool may hold it."""
        return bool(self._held)

    def unload(self, patience_s: float | None = None) -> None:
        """Free it on every pool that holds it.

        Starts no pool, and gives up on one that is busy after a while (by default `UNLOAD_PATIENCE_S`): freeing memory
        must neither fail nor hold up another job. What could not be freed is logged; on a busy pool it stays known,
        for the next time, and is logged once.
        """
        limit_s = UNLOAD_PATIENCE_S if patience_s is None else patience_s
        for name, (pool, key) in list(self._held.items()):
            try:
                pool.status()  # Refuses when the pool is gone; a call would start it anew.
                pool.call(m.Unload(keys=[key]), poll=_patience(limit_s))
            except TimeoutError as error:
                if self._told.get(name) != (key, str(error)):
                    self._told[name] = (key, str(error))
                    self._warn(name, error)
                continue
            except PoolError as error:
                self._warn(name, error)
            except Exception as error:
                # Whatever it is (no descriptor left, say): the other pools, and other models later, have their turn.
                self._warn(name, error, trace=True)
            self._told.pop(name, None)
            if self._held.get(name) == (pool, key):
                del self._held[name]

    def _warn(self, name: str, error: Exception, *, trace: bool = False) -> None:
        shown = error if trace else None
        log.warning("could not unload a %s from pool %s: %s", self._what, name, error, exc_info=shown)

    @property
    def is_ours(self) -> bool:
        """Whether this process made it; else this is a fork of that process, and what is held is not its to free."""
        return self._pid == os.getpid()

    def ends_with(self, owner: Any) -> None:
        """Unload when `owner` is collected: soon after, when the pool is free; or when ComfyUI ends.

        For what nobody can load again.
        """
        # Collected at any moment, perhaps in the midst of another lease: so another thread tells the workers.
        weakref.finalize(owner, _undertaker().put, self).atexit = False
        _mortal.add(self)


_mortal: weakref.WeakSet[Residency] = weakref.WeakSet()
"""What no other process can load again."""


@atexit.register
def unload_at_exit() -> None:
    """A pool outlives ComfyUI, and would keep the memory of copies that have no file any more."""
    for residency in list(_mortal):
        if residency.is_ours:
            residency.unload(EXIT_PATIENCE_S)


def _patience(limit_s: float) -> Callable[[], None]:
    deadline = time.monotonic() + limit_s

    def poll_until() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it is busy with another client's job for more than {limit_s:g} s")

    return poll_until


@functools.cache
def _undertaker() -> queue.SimpleQueue[Residency]:
    """Where to put what is to be unloaded; started with the first. A SimpleQueue may be put to in a finalizer."""
    gone: queue.SimpleQueue[Residency] = queue.SimpleQueue()

    def work() -> None:
        while True:
            residency = gone.get()
            residency.unload()
            if residency:
                # Its pool was busy for as long as we wait for it.
                gone.put(residency)

    threading.Thread(target=work, name="comfy-xdit-unload", daemon=True).start()
    return gone
