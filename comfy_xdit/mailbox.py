"""How a long job tells of its progress while it runs, and is told to stop.

The job runs on the worker's main thread; a thread of the transport reads from here and writes here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

MAX_CANCELLED = 64


class Mailbox:
    """Progress of one job at a time, and which jobs are to stop. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job = ""
        self._entries: deque[tuple[dict[str, Any], Callable[[], bool] | None]] = deque()
        self._is_abandoned = False
        # Remembered, since a cancel may overtake the job that it is for.
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def open(self, job: str) -> None:
        """The job begins; what an earlier one left is dropped."""
        with self._lock:
            self._job = job
            self._entries.clear()

    def post(self, entry: dict[str, Any], is_ready: Callable[[], bool] | None = None) -> None:
        """Add an entry that `take` will hand out, once; not before `is_ready`, which any thread may call."""
        with self._lock:
            self._entries.append((entry, is_ready))

    def take(self, job: str) -> list[dict[str, Any]]:
        """The entries of `job` since the last call, in order, up to one that isn't ready; none of another job."""
        found: list[dict[str, Any]] = []
        with self._lock:
            while job == self._job and self._entries:
                entry, is_ready = self._entries[0]
                if is_ready is not None and not is_ready():
                    break
                self._entries.popleft()
                found.append(entry)
        return found

    def cancel(self, job: str) -> None:
        with self._lock:
            self._cancelled[job] = None
            while len(self._cancelled) > MAX_CANCELLED:
                self._cancelled.popitem(last=False)

    def abandon(self) -> None:
        """The client is gone: cancel the job that runs, whatever it is called, and any that opens before `renew`."""
        with self._lock:
            self._is_abandoned = True

    def renew(self) -> None:
        """What comes now is another client's, or another lease's."""
        with self._lock:
            self._is_abandoned = False

    def is_cancelled(self, job: str) -> bool:
        with self._lock:
            return job in self._cancelled or self._is_abandoned
