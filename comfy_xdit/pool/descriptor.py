"""Who owns a file descriptor."""

from __future__ import annotations

import array
import os
import socket


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


def receive(sock: socket.socket, num_bytes: int, max_fds: int) -> tuple[bytes, list[Descriptor]]:
    """What `sock` has, at most so many bytes, and the descriptors that came with it; programs that we start don't
    inherit them.

    `socket.recv_fds` of Python up to 3.12 at least drops its flags, and gives descriptors that are inherited.
    """
    item = array.array("i").itemsize
    space = socket.CMSG_LEN(max_fds * item)
    data, ancillary, _, _ = sock.recvmsg(num_bytes, space, socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(raw[: len(raw) - len(raw) % item])
    return data, [Descriptor(fd) for fd in found]
