"""Sockets that a forked child must not keep.

Programs that we start lose them at exec; a plain fork (another node's multiprocessing, say) would hold them open, and
the other end would not learn that this process has ended.
"""

from __future__ import annotations

import os
import socket
import weakref

_ours: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(sock: socket.socket) -> None:
    """Have forked children close their copy of `sock`."""
    _ours.add(sock)


def _close_all() -> None:
    for sock in list(_ours):
        sock.close()


os.register_at_fork(after_in_child=_close_all)
