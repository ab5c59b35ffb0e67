"""Who owns a file descriptor."""

from __future__ import annotations

import os


class Descriptor:
    """A file descriptor that is closed with the last reference to it, unless somebody else took it over."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._is_ours = True

    def release(self) -> None:
        """Somebody else closes it."""
        self._is_ours = False

    def __del__(self) -> None:
        if self._is_ours:
            os.close(self.fd)
