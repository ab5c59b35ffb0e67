"""Locks on files of a pool's folder, and which process holds one, even when somebody deleted the file."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

DELETED = " (deleted)"
"""What the kernel adds to the name of an open file that has none any more (proc_pid_fd(5))."""


class Lock:
    """An flock(2), free again when `release` is called or this process ends, in whatever way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1

    def take(self) -> bool:
        """Whether it was free; it is held from now on. Raises OSError when there can't be such a file."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self.release()
        self._handle = handle
        return self.is_in_place

    @property
    def is_in_place(self) -> bool:
        """Whether it is held, and whoever looks for it at its path finds this one."""
        if self._handle < 0:
            return False
        held = os.fstat(self._handle)
        try:
            found = self.path.stat()
        except OSError:
            return False
        return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)

    def release(self) -> None:
        """Let go of it; harmless when it isn't held."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def holders(path: Path) -> list[int]:
    """Other processes of this user that hold the lock at `path`, or one that was deleted from there."""
    real = os.path.realpath(path)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            # A process that ends meanwhile, or is somebody else's.
            with contextlib.suppress(OSError):
                if any(_holds(entry, handle.name, real) for handle in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
    return found


def _holds(process: Path, handle: str, real: str) -> bool:
    try:
        if os.readlink(process / "fd" / handle).removesuffix(DELETED) != real:
            return False
        return "FLOCK" in (process / "fdinfo" / handle).read_text()
    except OSError:
        # Closed meanwhile.
        return False
