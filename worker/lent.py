"""Files that another process lends the workers, and whether it still lives."""

from __future__ import annotations

import fcntl
import os
import weakref


class Lent:
    """A file that its writer has locked, flock(2), for as long as it lives.

    So ComfyUI's nodes do with weights that have no file of their own: nobody else can name such a copy, and a process
    that was killed says no goodbye.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        weakref.finalize(self, os.close, handle)

    @property
    def is_abandoned(self) -> bool:
        """Whether its writer is gone, also when the file was removed since."""
        return not _is_locked(self._handle)


def lent(path: str) -> Lent | None:
    """The file at `path`, if its writer has it locked; None for all others, and when it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    if _is_locked(handle):
        return Lent(handle)
    os.close(handle)
    return None


def _is_locked(handle: int) -> bool:
    try:
        # Shared, so that ranks that ask at the same moment don't take each other for the writer.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # A file system without locks.
        return False
    fcntl.flock(handle, fcntl.LOCK_UN)
    return False
