"""Who has the lease: the queue of clients and the generation of the group of client and workers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from .wire import Wire


@dataclasses.dataclass(eq=False)
class ClientLine:
    """The connection of one client; as long as it is open, the client lives."""

    wire: Wire
    pid: int
    waiting_since: float = 0.0
    joined: int = 0
    heard_at: float = 0.0
    is_told: bool = False
    """That it waits for a client which gives no sign of life."""

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            self.wire.send(message, fds)
        except ConnectionError:
            # Its socket reports the end to the coordinator, which then acts on it.
            return


@dataclasses.dataclass
class Leases:
    """The state of the group. phase: "none" (no group), "preparing" (workers leave the last one),
    "joining", "open" (the holder can send).
    """

    generation: int
    phase: str = "none"
    phase_since: float = 0.0
    holder: ClientLine | None = None
    is_leased: bool = False
    leased_since: float = 0.0
    queue: list[ClientLine] = dataclasses.field(default_factory=list)

    def enter(self, phase: str) -> None:
        self.phase, self.phase_since = phase, time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Nobody else can be let in now."""
        return self.is_leased or self.phase in ("preparing", "joining")

    def ask(self, client: ClientLine, generation: object) -> bool:
        """True when `client` may go on in the group that it is in; else it is queued."""
        is_member = client is self.holder and self.phase == "open" and generation == self.generation
        # Not past the queue: its head has been waiting since before the last lease ended.
        if is_member and not self.queue:
            self._begin_lease(client)
            return True
        if client is self.holder and self.phase == "open":
            # It has lost its group without us, so it is in no lease any more.
            self.is_leased = False
        is_coming = client is self.holder and self.phase in ("preparing", "joining")
        # It asks twice when it learns of a lost group after it has asked.
        if client not in self.queue and not is_coming:
            client.waiting_since, client.is_told = time.monotonic(), False
            self.queue.append(client)
        return False

    def next(self) -> ClientLine:
        """The next holder, with a generation of its own."""
        self.holder = self.queue.pop(0)
        self.generation += 1
        self.is_leased = False
        self.enter("preparing")
        return self.holder

    def open(self) -> None:
        assert self.holder is not None
        self._begin_lease(self.holder)
        self.enter("open")

    def _begin_lease(self, holder: ClientLine) -> None:
        self.is_leased, self.leased_since = True, time.monotonic()
        holder.heard_at = self.leased_since

    def forget(self, client: ClientLine) -> bool:
        """Let go of a client; True when the group was its."""
        if client in self.queue:
            self.queue.remove(client)
        if client is not self.holder:
            return False
        self.holder, self.is_leased = None, False
        if self.phase == "open":
            self.enter("none")
        return True

    def lose(self) -> ClientLine | None:
        """The workers are gone: no group. Returns who held it; it asks again when it is ready to join."""
        holder = self.holder
        self.holder, self.is_leased = None, False
        self.enter("none")
        return holder
