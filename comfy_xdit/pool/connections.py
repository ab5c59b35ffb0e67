"""The door's sockets: who comes in, what they say, and who is gone."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import PoolError
from .network import Network
from .roster import WorkerLine
from .turns import ClientLine
from .wire import Wire

log = logging.getLogger("comfy_xdit")

Line = Wire | WorkerLine | ClientLine
"""A connection: of a newcomer who has not said who it is, of a worker, or of a client."""


class Connections:
    """All that are open, each with its line."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def listen(self, listener: socket.socket) -> None:
        """Let in who comes to `listener`."""
        self._selector.register(listener, selectors.EVENT_READ, listener)

    def wait(self, timeout_s: float) -> Iterator[Line]:
        """The lines on which something came within `timeout_s`."""
        ready = [key.data for key, _ in self._selector.select(timeout_s)]
        # Workers first: a client that acts on a worker's answer must find its report already judged.
        for line in sorted(ready, key=lambda line: not isinstance(line, WorkerLine)):
            if isinstance(line, socket.socket):
                self._accept(line)
            elif wire_of(line).fileno() >= 0:
                yield line

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            wire = Wire(sock)
            if not wire.is_remote and wire.peer()[1] != os.getuid():
                wire.close()
                return
            self._selector.register(sock, selectors.EVENT_READ, wire)

    def read(self, line: Line) -> list[dict[str, Any]] | None:
        """What came on a line; None when it is closed, or what came is no message."""
        try:
            return wire_of(line).read()
        except ConnectionError:
            return None
        except ValueError as error:
            log.warning("door: dropped a connection that sent %s", error)
            return None

    def become(self, wire: Wire, line: WorkerLine | ClientLine) -> None:
        """The newcomer on `wire` said who it is."""
        self._selector.modify(wire.sock, selectors.EVENT_READ, line)

    def drop(self, line: Line) -> None:
        """Close it; harmless when that was done."""
        wire = wire_of(line)
        if wire.fileno() >= 0:
            self._selector.unregister(wire.sock)
            wire.close()


def wire_of(line: Line) -> Wire:
    return line if isinstance(line, Wire) else line.wire


def listener_at(path: Path) -> socket.socket:
    """Listens at a path, for this user's processes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen(64)
    return listener


def listener_on(network: Network) -> socket.socket:
    """Listens where the workers of other machines look for the door. Raises PoolError when the port is taken."""
    try:
        return socket.create_server((network.address, network.port), backlog=64)
    except OSError as error:
        raise PoolError(
            f"cannot listen at {network.door} ({os.strerror(error.errno or 0)}); give another port with --port"
        ) from None
