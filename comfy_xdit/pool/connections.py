"""The coordinator's sockets: who comes in, what they say, and who is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import PoolError
from .handshake import Challenge
from .leases import ClientLine
from .membership import WorkerLine
from .network import Network
from .wire import Wire

log = logging.getLogger("comfy_xdit")

NEWCOMER_LIMIT_S = 15.0
"""How long a connection may take to say who it is."""

PAUSE_S = 0.5
"""Until a listener that could not let anybody in is tried again."""

MAX_NEWCOMERS = 64
"""Connections at each coordinator that have not said who they are."""


@dataclasses.dataclass(eq=False)
class Newcomer:
    """A connection that has not said who it is. challenge: what it must answer first, over a network."""

    wire: Wire
    since: float
    challenge: Challenge | None = None


Line = Newcomer | WorkerLine | ClientLine
"""A connection: of a newcomer, of a worker, or of a client."""


class Connections:
    """All that are open, each with its line.

    challenge: makes what a newcomer over the network must answer; None where nobody comes over one.
    """

    def __init__(self, challenge: Callable[[], Challenge] | None = None) -> None:
        self._selector = selectors.DefaultSelector()
        self._challenge = challenge
        self._newcomers: list[Newcomer] = []
        self._paused: dict[socket.socket, float] = {}
        """Listeners that are not listened to, each with the time when they are again."""
        self._is_short = False
        """Whether the last who came could not be let in."""

    def listen(self, listener: socket.socket) -> None:
        """Let in who comes to `listener`."""
        self._selector.register(listener, selectors.EVENT_READ, listener)

    def unlisten(self, listener: socket.socket) -> None:
        """Let nobody in there any more; who is in stays."""
        if self._paused.pop(listener, None) is None:
            self._selector.unregister(listener)
        listener.close()

    def wait(self, timeout_s: float) -> Iterator[Line]:
        """The lines on which something came within `timeout_s`."""
        self._resume()
        ready = [key.data for key, _ in self._selector.select(timeout_s)]
        # Workers first: a client that acts on a worker's answer must find its report already judged.
        for line in sorted(ready, key=lambda line: not isinstance(line, WorkerLine)):
            if isinstance(line, socket.socket):
                self._accept(line)
            elif line.wire.fileno() >= 0:
                yield line

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except ConnectionError:
            # It went away while it waited.
            return
        except OSError as error:
            self._pause(listener, error)
            return
        self._is_short = False
        with contextlib.suppress(OSError):
            wire = Wire(sock)
            if not wire.is_remote and wire.peer()[1] != os.getuid():
                wire.close()
                return
            self._enter(Newcomer(wire=wire, since=time.monotonic()))

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        """No room for a descriptor, say. Who waits goes on waiting, and would be reported again and again."""
        if not self._is_short:
            log.warning("coordinator: cannot let anybody in (%s); tried again every %g s", error.strerror, PAUSE_S)
        self._is_short = True
        self._selector.unregister(listener)
        self._paused[listener] = time.monotonic() + PAUSE_S

    def _resume(self) -> None:
        now = time.monotonic()
        for listener in [listener for listener, until in self._paused.items() if until <= now]:
            del self._paused[listener]
            self.listen(listener)

    def _enter(self, newcomer: Newcomer) -> None:
        alike = [other for other in self._newcomers if other.wire.is_remote == newcomer.wire.is_remote]
        if len(alike) >= MAX_NEWCOMERS:
            # The oldest: one of ours says who it is at once, a stranger may never.
            log.warning("coordinator: dropped the oldest of %d connections that have not said who they are", len(alike))
            self.drop(alike[0])
        self._newcomers.append(newcomer)
        self._selector.register(newcomer.wire.sock, selectors.EVENT_READ, newcomer)
        if newcomer.wire.is_remote and self._challenge is not None:
            newcomer.challenge = self._challenge()
            with contextlib.suppress(ConnectionError):
                newcomer.wire.send(newcomer.challenge.question)

    def drop_slow(self) -> None:
        """Hang up on newcomers who took too long."""
        limit = time.monotonic() - NEWCOMER_LIMIT_S
        for newcomer in [newcomer for newcomer in self._newcomers if newcomer.since < limit]:
            log.warning("coordinator: dropped a connection that did not say who it is in %.0f s", NEWCOMER_LIMIT_S)
            self.drop(newcomer)

    def read(self, line: Line) -> list[dict[str, Any]] | None:
        """What came on a line; None when it is closed, or what came is no message."""
        try:
            return line.wire.read()
        except ConnectionError:
            return None
        except ValueError as error:
            log.warning("coordinator: dropped a connection that sent %s", error)
            return None

    def become(self, newcomer: Newcomer, line: WorkerLine | ClientLine) -> None:
        """The newcomer said who it is."""
        self._newcomers.remove(newcomer)
        self._selector.modify(newcomer.wire.sock, selectors.EVENT_READ, line)

    def drop(self, line: Line) -> None:
        """Close it; harmless when that was done."""
        if isinstance(line, Newcomer) and line in self._newcomers:
            self._newcomers.remove(line)
        if line.wire.fileno() >= 0:
            self._selector.unregister(line.wire.sock)
            line.wire.close()


@contextlib.contextmanager
def pairs(number: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Both ends of so many connections, to be passed on within the block; at its end our copies are closed."""
    made: list[socket.socket] = []
    try:
        for _ in range(number):
            made += socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        yield made[::2], made[1::2]
    finally:
        for sock in made:
            sock.close()


def listener_at(path: Path) -> socket.socket:
    """Listens at a path, for this user's processes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen(64)
    return listener


def listener_on(network: Network) -> socket.socket:
    """Listens where the workers of other machines look for the coordinator. Raises PoolError when the port is taken."""
    try:
        return socket.create_server((network.address, network.port), backlog=64)
    except OSError as error:
        raise PoolError(
            f"cannot listen at {network.coordinator} ({os.strerror(error.errno or 0)}); give another port with --port"
        ) from None
