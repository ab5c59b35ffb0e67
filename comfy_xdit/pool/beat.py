"""A client's sign of life while it has the lease."""

from __future__ import annotations

import threading

from .wire import Wire

BEAT_S = 1.0


class Beat:
    """Tells the coordinator each second that this process lives, between `start` and `stop`, on a thread of its own: a
    job may take minutes. The thread ends with the connection."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._is_on = threading.Event()
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="comfy-xdit-beat", daemon=True).start()

    def start(self) -> None:
        self._is_on.set()

    def stop(self) -> None:
        """Be quiet until the next `start`."""
        self._is_on.clear()

    def end(self) -> None:
        """The connection is closed."""
        self._is_over.set()
        self._is_on.set()

    def _run(self) -> None:
        while True:
            self._is_on.wait()
            if self._is_over.is_set():
                return
            try:
                self._wire.send({"type": "beat"})
            except ConnectionError:
                # Who reads from it learns of it too.
                return
            self._is_over.wait(BEAT_S)
