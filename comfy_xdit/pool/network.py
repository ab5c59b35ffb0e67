"""The network between the machines of one pool: the interface that is named for it, and nothing beside that."""

from __future__ import annotations

import dataclasses
import fcntl
import shlex
import socket
import struct
from pathlib import Path
from typing import Any

from .errors import PoolError

LOOPBACK = "lo"
"""Where a pool on one machine listens."""

COORDINATOR_PORT = 29600
"""Of the coordinator, where none is given. torchrun's own are 29400 and 29500."""

MAX_MACHINES = 64

SIOCGIFADDR = 0x8915
"""Asks the kernel for an interface's IPv4 address (netdevice(7))."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Where the coordinator of a pool on several machines listens for workers.

    interface: of this machine, the head; address: the IPv4 address that it has there.
    """

    num_machines: int
    interface: str
    address: str
    port: int = COORDINATOR_PORT

    @property
    def coordinator(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def torchrun(self, num_devices: int, machine: int | str, key: Path) -> str:
        """The command that makes a machine part of the pool.

        Each machine has a torchrun of its own: one of several nodes would want a second port that all can reach, and
        end everywhere when the first machine's ends. It must not count restarts: the coordinator does. key: the file
        with the pool's key, on that machine; never the key itself, since everybody can read a command line.
        """
        return (
            f"torchrun --nproc-per-node {num_devices} --max-restarts 1000000 "
            f"-m comfy_xdit pool join {self.coordinator} --node-rank {machine} --key-file {shlex.quote(str(key))}"
        )


def addresses() -> dict[str, str]:
    """Each interface of this machine that has an IPv4 address, with it."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def listed(found: dict[str, str]) -> str:
    """What `addresses` found, for people."""
    return ", ".join(f"{name} ({address})" for name, address in found.items()) or "none"


def network_on(interface: str, *, num_machines: int, port: int = COORDINATOR_PORT) -> Network:
    """The network that this machine reaches through `interface`.

    Raises PoolError for an interface that isn't there or has no IPv4 address, and for bad numbers.
    """
    if not 2 <= num_machines <= MAX_MACHINES:
        raise PoolError(f"--nodes {num_machines} is no number of machines; use 1 to {MAX_MACHINES}", kind="input")
    if not 1 <= port <= 65535:
        raise PoolError(f"--port {port} is no port; use 1024 to 65535", kind="input")
    found = addresses()
    if interface not in found:
        raise PoolError(
            f"--interface {interface!r} is no interface with an IPv4 address; name the one to the network between the "
            f"machines; this machine has {listed(found)}",
            kind="input",
        )
    return Network(num_machines=num_machines, interface=interface, address=found[interface], port=port)


def interface_of(address: str) -> str | None:
    """The interface that has `address` on this machine."""
    return next((name for name, own in addresses().items() if own == address), None)


def place_of(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises PoolError for other texts."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise PoolError(f"{text!r} is no HOST:PORT; use what `comfy-xdit pool start --nodes` printed", kind="input")
    return host, int(port)
