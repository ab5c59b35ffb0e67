"""The one error that users of a pool see."""

from __future__ import annotations


class PoolError(RuntimeError):
    """A pool could not do what was asked; `str(error)` is one sentence for the user.

    kind: "input" (the user's mistake), "memory" (a device is full), "fault" (a bug on a worker, see
    `trace`), "lost" (workers ended or hang; the pool restarts them, so the job can be run again),
    "pool" (no pool to talk to).
    """

    def __init__(self, message: str, *, kind: str = "pool", trace: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.trace = trace
