"""How a long job tells of its progress while it runs, and is told to stop.

The job runs on the worker's main thread; an RPC thread reads from here and writes here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

MAX_CANCELLED = 64


class Mailbox:
    """Progress of one job at a time, and which jobs are to stop. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job = ""
        self._entries: list[dict[str, Any]] = []
        self._is_abandoned = False
        # Remembered, since a cancel may overtake the job that it is for.
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def open(self, job: str) -> None:
        """The job begins; what an earlier one left is dropped."""
        with self._lock:
            self._job, self._entries, self._is_abandoned = job, [], False

    def post(self, entry: dict[str, Any]) -> None:
        """Add an entry that `take` will hand out, once."""
        with self._lock:
            self._entries.append(entry)

    def take(self, job: str) -> list[dict[str, Any]]:
        """The entries of `job` since the last call, in order; none when another job runs."""
        with self._lock:
            if job != self._job:
                return []
            entries, self._entries = self._entries, []
            return entries

    def cancel(self, job: str) -> None:
        with self._lock:
            self._cancelled[job] = None
            while len(self._cancelled) > MAX_CANCELLED:
                self._cancelled.popitem(last=False)

    def cancel_current(self) -> None:
        """Cancel the job that runs, whatever it is called; not one that opens later."""
        with self._lock:
            self._is_abandoned = True

    def is_cancelled(self, job: str) -> bool:
        with self._lock:
            return job in self._cancelled or (self._is_abandoned and job == self._job)
