"""A coordinator that is played with, and workers that say what they are told to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from harness import wait_until

from comfy_xdit.pool.coordinator import Coordinator
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.handshake import prove, read_key
from comfy_xdit.pool.locks import Lock
from comfy_xdit.pool.network import Network
from comfy_xdit.pool.wire import Wire, versions

PORTS = 5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Over(Exception):
    """Ends a coordinator that is played with."""


def _opened(lock: Lock, num_machines: int, num_devices: int) -> Coordinator:
    """At a port that was free; another program may take it in between, so several are tried."""
    for attempt in range(PORTS):
        network = None
        if num_machines > 1:
            network = Network(num_machines=num_machines, interface="lo", address="127.0.0.1", port=free_port())
        try:
            return Coordinator(
                pool_folder("test"),
                ["cpu"] * num_devices,
                lock=lock,
                stop=lambda: None,
                kill_starting=lambda: None,
                network=network,
            )
        except PoolError:
            if attempt + 1 == PORTS:
                raise
    raise AssertionError


@contextlib.contextmanager
def played_coordinator(num_machines: int, num_devices: int = 2) -> Iterator[Coordinator]:
    """A coordinator of the pool "test" on its own thread: for machines on loopback, or for one machine alone.

    Its pools' folder is the one of this moment's $COMFY_XDIT_HOME.
    """
    lock = pool_folder("test").lock("alive")
    assert lock.take()
    coordinator = _opened(lock, num_machines, num_devices)
    is_over, tick = threading.Event(), coordinator._tick

    def tick_until_over() -> None:
        if is_over.is_set():
            raise Over
        tick()

    def run() -> None:
        with contextlib.suppress(Over):
            coordinator.run()

    coordinator._tick = tick_until_over  # type: ignore[method-assign]
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield coordinator
        assert thread.is_alive(), "the coordinator ended"
    finally:
        is_over.set()
        thread.join()
        lock.release()


class Played:
    """A worker of machine `number` that says what it is told to. proves: first, that it holds the pool's key."""

    def __init__(self, coordinator: Coordinator, number: int, *, proves: bool = True, **changes: Any) -> None:
        assert coordinator.network is not None
        self.wire = Wire.connect((coordinator.network.address, coordinator.network.port))
        if proves:
            prove(self.wire, read_key(coordinator.folder.key))
        hello = {"type": "worker", "machine": number, "local_rank": 0, "num_local": 1, "versions": versions()}
        self.wire.send(hello | {"host": f"host-{number}", "pid": 1000 + number} | changes)

    def say(self, kind: str, **fields: Any) -> None:
        self.wire.send({"type": kind, **fields})

    def hears(self) -> dict[str, Any] | None:
        """The next message; None when the coordinator closes the connection."""
        return hears(self.wire)

    def hears_nothing(self) -> bool:
        return self.wire.wait(0.6) == []


def hears(wire: Wire) -> dict[str, Any] | None:
    """The next message on a wire; None when the other end closes the connection."""
    with contextlib.suppress(ConnectionError):
        message: dict[str, Any] = wait_until(lambda: wire.wait(0.1), "a word of the coordinator")[0]
        return message
    return None
