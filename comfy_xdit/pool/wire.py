"""One JSON object a line over a socket: how clients and workers talk to the pool's coordinator.

A line of the coordinator's may bring descriptors: it says how many ("num_fds"), and its reader finds them in "fds",
as `Descriptor`s: those that nobody uses close with the message.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from .descriptor import Descriptor, receive
from .forks import close_in_children

MAX_LINE_BYTES = 1 << 20
SEND_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S, RETRY_S = 10.0, 0.02

MAX_FDS = 128
"""With one line; the kernel takes up to 253."""

SILENCE_LIMIT_S = 15.0
"""After so long without an answer from the other machine's kernel, a connection over the network is broken."""


def versions() -> dict[str, str]:
    """What both sides must agree on. Torch to its minor version: RPC's wire format is its own.

    Read from the package's metadata: the coordinator answers before torch is imported.
    """
    return {"comfy_xdit": __version__, "torch": ".".join(metadata.version("torch").split(".")[:2])}


def spell(found: Any) -> str:
    """Versions for people."""
    if not isinstance(found, dict):
        return "unknown"
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in sorted(found.items()))


class Wire:
    """One end of a connection. Raises ConnectionError when the other end is gone or does not read."""

    def __init__(self, sock: socket.socket, *, takes_fds: bool = False) -> None:
        """takes_fds: keep descriptors that come; else the kernel closes them."""
        self.sock = sock
        close_in_children(sock)
        self._sending = threading.Lock()
        self._buffer = b""
        self._takes_fds = takes_fds
        self._fds: list[Descriptor] = []
        # A peer that was stopped must not stop us: its buffer fills up, and then we let go of it.
        sock.settimeout(SEND_TIMEOUT_S)
        if self.is_remote:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A machine that lost its power or its cable says no goodbye.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_LIMIT_S * 1000))

    @classmethod
    def connect(cls, place: Path | tuple[str, int], *, timeout_s: float = CONNECT_TIMEOUT_S) -> Wire:
        """To the coordinator, at a path of this machine or a host and port. Raises OSError when nobody listens there,
        TimeoutError when somebody does and lets nobody in for `timeout_s`.
        """
        sock = socket.socket(socket.AF_INET if isinstance(place, tuple) else socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            deadline = time.monotonic() + timeout_s
            while True:
                try:
                    sock.connect(place if isinstance(place, tuple) else str(place))
                    break
                except BlockingIOError:
                    # unix(7): the queue of those who wait to be let in is full.
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{place} lets nobody in") from None
                    time.sleep(RETRY_S)
        except OSError:
            sock.close()
            raise
        # It is our own coordinator, in a folder that only we can enter.
        return cls(sock, takes_fds=not isinstance(place, tuple))

    @property
    def is_remote(self) -> bool:
        """Whether it goes over a network: then nothing is known of who is at the other end."""
        return self.sock.family == socket.AF_INET

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one object, and copies of `fds` with it; any thread may call. When that fails the connection ends."""
        line = json.dumps({**message, "num_fds": len(fds)} if fds else message).encode() + b"\n"
        try:
            with self._sending:
                # With the first byte, so they are there before the line is whole.
                sent = socket.send_fds(self.sock, [line], fds) if fds else 0
                self.sock.sendall(line[sent:])
        except OSError as error:
            # Half a line may have left, and what came next would be taken for its rest. So this is the end, and who
            # reads from it, here and there, learns of it.
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
            raise ConnectionError(str(error)) from None

    def read(self) -> list[dict[str, Any]]:
        """The objects that have arrived whole (perhaps none yet), once the socket is readable.

        Raises ValueError for what is no JSON object, or longer than MAX_LINE_BYTES.
        """
        try:
            data = self._receive(1 << 16)
        except OSError as error:
            raise ConnectionError(str(error)) from None
        if not data:
            raise ConnectionError("the other end closed")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError("a line that is no JSON") from None
            if not isinstance(message, dict):
                raise ValueError("a line that is no JSON object")
            if "num_fds" in message:
                message["fds"] = self._take_fds(message["num_fds"])
            messages.append(message)
        return messages

    def _receive(self, num_bytes: int) -> bytes:
        if not self._takes_fds:
            return self.sock.recv(num_bytes)
        data, fds = receive(self.sock, num_bytes, MAX_FDS)
        self._fds += fds
        return data

    def _take_fds(self, number: object) -> list[Descriptor]:
        if not isinstance(number, int) or not 0 < number <= len(self._fds):
            # The kernel drops those for which this process has no room.
            raise ConnectionError(f"{len(self._fds)} descriptors came, not {number}; perhaps too many files are open")
        taken, self._fds = self._fds[:number], self._fds[number:]
        return taken

    def wait(self, timeout_s: float) -> list[dict[str, Any]]:
        """The objects that arrive within `timeout_s`, returning at the first; [] when none came."""
        # poll, not select: ComfyUI may have more than 1,024 files open.
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return self.read() if poller.poll(max(0, int(timeout_s * 1000))) else []

    def peer(self) -> tuple[int, int]:
        """Process id and user id of the other end, from the kernel; not for one that is remote."""
        raw = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", raw)
        return pid, uid

    def close(self) -> None:
        self.sock.close()
        self._fds.clear()
