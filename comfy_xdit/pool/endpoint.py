"""Where clients find a pool: its folder, with the lock and the socket in it, kept there as long as the pool lives."""

from __future__ import annotations

import logging
import os
import socket

from .connections import Connections, listener_at
from .errors import PoolError
from .folder import PoolFolder
from .locks import Lock, holders

log = logging.getLogger("comfy_xdit")


class Endpoint:
    """The socket of a pool whose supervisor is this process, and the lock that says so.

    Belongs to the coordinator's thread. lock: taken. Somebody may delete the folder, or files in it (a cleaner of
    /tmp): then clients would find no pool, or start a second one on the same devices.
    """

    def __init__(self, folder: PoolFolder, lock: Lock, connections: Connections) -> None:
        self._folder, self._lock, self._connections = folder, lock, connections
        self._listener: socket.socket | None = None
        self._identity = (0, 0)
        self._has_failed = False

    def open(self) -> None:
        """Listen. Raises OSError."""
        if self._listener is not None:
            self._connections.unlisten(self._listener)
        self._folder.socket.unlink(missing_ok=True)
        self._listener = listener_at(self._folder.socket)
        self._identity = self._found()
        self._connections.listen(self._listener)

    def keep(self, generation: int) -> None:
        """Put lock, socket and number back where they were deleted or replaced.

        Raises PoolError when another pool has the place now: two can't have one name.
        """
        if self._lock.is_in_place and self._found() == self._identity:
            return
        try:
            self._restore(generation)
        except OSError as error:
            if not self._has_failed:
                log.warning("%s can't be made anew (%s); tried again and again", self._folder.path, error)
            self._has_failed = True
            return
        self._has_failed = False
        log.warning("%s was deleted or replaced by somebody; it is made anew", self._folder.socket)

    def _restore(self, generation: int) -> None:
        try:
            self._folder.make()
        except PoolError as error:
            raise OSError(str(error)) from None
        if not self._lock.is_in_place and not self._lock.take():
            others = holders(self._lock.path)
            if others:
                raise PoolError(
                    f"the folder of pool {self._folder.name!r} was deleted, and process {others[0]} started another "
                    "pool of this name there; this one ends"
                )
            raise OSError("its lock was deleted again")
        self.open()
        self._folder.note_generation(generation)

    def _found(self) -> tuple[int, int]:
        """What lies at the socket's path; (0, 0) for nothing."""
        try:
            found = os.stat(self._folder.socket, follow_symlinks=False)
        except OSError:
            return (0, 0)
        return (found.st_dev, found.st_ino)
