"""Another user of the machine, who throws what it can at a pool: `stranger.py SOCKET PORT …`. Says what it did.

Started by root it becomes `nobody` first.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - as long as we may read Python's own files
import os
import socket
import struct
import sys
import time

NOBODY = 65534

THROWN = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "junk": os.urandom(1 << 16),
    "ones": b"\xff" * 4096,
    "zeros": bytes(4096),
    "a huge length": struct.pack("<Q", (1 << 62) + 1) + b"x" * 64,
    "nothing": b"",
    "half a number": b"\x01\x00",
    # What TensorPipe, under torch's RPC, begins a connection with: a length, then a message of that length.
    "rpc": struct.pack("<QQ", 16, 0) + b"\x02\x00\x00\x00aten::from_file\x00" * 4,
}


def become_nobody() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def throw(port: int) -> list[socket.socket]:
    """Everything at one port; the connections that it leaves open."""
    left = []
    for data in THROWN.values():
        for is_held in (False, True):
            with contextlib.suppress(OSError):
                sock = socket.create_connection(("127.0.0.1", port), timeout=5)
                sock.sendall(data)
                if is_held:
                    left.append(sock)
                else:
                    sock.close()
    for _ in range(100):
        with contextlib.suppress(OSError):
            left.append(socket.create_connection(("127.0.0.1", port), timeout=5))
    return left


def at_the_coordinator(path: str) -> str:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
        sock.sendall(b'{"type": "status"}\n')
        sock.settimeout(5)
        return "let in" if sock.recv(1) else "hung up on"
    except OSError as error:
        return type(error).__name__


def main(coordinator: str, *ports: str) -> None:
    become_nobody()
    sys.stdout.write(f"coordinator {at_the_coordinator(coordinator)}\n")
    left = [sock for port in ports for sock in throw(int(port))]
    sys.stdout.write(f"thrown {len(left)}\n")
    sys.stdout.flush()
    # With all of them open, until it is ended.
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
