"""Lets one client after the other in: a lease for its head of the queue, a group of it and the workers, a grant."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from .connections import Connections, pairs
from .errors import PoolError
from .folder import PoolFolder, unwritable
from .judge import Cause
from .leases import ClientLine, Leases
from .membership import Membership
from .network import LOOPBACK
from .silence import TAKE_AFTER_S, TELL_AFTER_S, silent_s, who_has_the_lease, why_taken
from .stores import FileStores, SharedStores
from .transport import RPC

log = logging.getLogger("comfy_xdit")

JOIN_LIMIT_S = 15.0
PREPARE_LIMIT_S = 120.0
"""How long a message whose client is gone or lost interest may run on before the workers restart."""

ABSENT_LIMIT_S = 60.0
"""How long a client waits for machines that aren't there."""


class Grants:
    """The clients of a pool. Belongs to the coordinator's thread.

    missing: which workers of other machines aren't there, in a sentence; "" when all are.
    """

    def __init__(
        self,
        folder: PoolFolder,
        membership: Membership,
        connections: Connections,
        stores: FileStores | SharedStores,
        transport: str,
        *,
        missing: Callable[[], str],
    ) -> None:
        self._folder, self._membership = folder, membership
        self._connections, self._stores, self._transport = connections, stores, transport
        self._missing = missing
        self.leases = Leases(generation=folder.last_generation())

    # What clients and workers say

    def asked(self, client: ClientLine, generation: object) -> None:
        """A client wants a lease; `generation` is the group that it is in."""
        if self.leases.ask(client, generation):
            client.send({"type": "grant", "generation": self.leases.generation})
            return
        self.advance()
        if client in self.leases.queue and self.leases.is_leased:
            client.send({"type": "waiting", "text": who_has_the_lease(self.leases)})

    def ended(self, client: ClientLine) -> None:
        """A client's lease is over, or it waits for none any more."""
        leases = self.leases
        if client in leases.queue:
            leases.queue.remove(client)
        if client is leases.holder and leases.phase == "open":
            leases.is_leased = False
            self.advance()
        elif leases.forget(client):
            # It lost interest while its group was being made.
            self.advance()

    def left(self, client: ClientLine) -> None:
        """A client is gone."""
        if self.leases.forget(client):
            # Its job is dropped and what it held is freed; the workers themselves stay as they are.
            self._membership.broadcast({"type": "leave", "generation": self.leases.generation})
            self.advance()

    def advance(self) -> None:
        """Let the next client in, if there is one and the workers are free for it."""
        if self.leases.is_busy or not self.leases.queue or not self._membership.is_ready:
            return
        try:
            # First: a number that was used and not kept might return.
            self._folder.note_generation(self.leases.generation + 1)
        except OSError as error:
            self.refuse_all(str(unwritable(self._folder, error)))
            return
        self.leases.next()
        self._membership.broadcast({"type": "prepare", "generation": self.leases.generation})

    def join_when_prepared(self) -> None:
        """Have the group made, once all workers are free for it."""
        leases, workers = self.leases, self._membership.workers.values()
        if leases.phase != "preparing" or any(w.prepared != leases.generation for w in workers):
            return
        if leases.holder is None:
            leases.enter("none")
            self.advance()
            return
        leases.enter("joining")
        try:
            self._order_joining(leases.holder, leases.generation)
        except PoolError as error:
            leases.holder.send({"type": "refused", "reason": str(error)})
            leases.forget(leases.holder)
            leases.enter("none")
            self.advance()

    def _order_joining(self, holder: ClientLine, generation: int) -> None:
        """Tell client and workers to join. Raises PoolError when they have no place to."""
        join: dict[str, Any] = {"type": "join", "generation": generation, "transport": self._transport}
        if self._transport == RPC:
            join["store"] = self._stores.for_rpc(generation)
            self._membership.broadcast(join)
            network = self._membership.network
            holder.send({**join, "interface": network.interface if network else LOOPBACK})
            return
        workers = [worker for _, worker in sorted(self._membership.workers.items())]
        try:
            with pairs(len(workers)) as (client_ends, worker_ends):
                for worker, end in zip(workers, worker_ends, strict=True):
                    worker.send(join, [end.fileno()])
                holder.send(join, [end.fileno() for end in client_ends])
        except OSError as error:
            raise PoolError(f"no sockets between client and workers ({error.strerror})") from None

    def open_when_joined(self) -> None:
        """Grant the lease, once the group is made."""
        leases, workers = self.leases, list(self._membership.workers.values())
        generation = leases.generation
        if leases.phase != "joining" or any(generation not in (w.joined, w.join_failed) for w in workers):
            return
        holder = leases.holder
        if holder is not None and holder.joined == generation and all(w.joined == generation for w in workers):
            leases.open()
            holder.send({"type": "grant", "generation": generation})
            return
        if holder is None or any(w.join_failed == generation for w in workers):
            self._give_up_joining()

    def _give_up_joining(self) -> None:
        """The client went away, or stopped, while joining. The workers are sound and stay."""
        holder = self.leases.holder
        self.leases.enter("none")
        if holder is not None:
            self.leases.forget(holder)
            self._connections.drop(holder)
        self.advance()

    # A client that gives no sign of life

    def watch(self) -> None:
        """Tell those who wait of a client that has the lease and is silent; take the lease from it in the end."""
        leases, quiet_s = self.leases, silent_s(self.leases)
        if quiet_s < TELL_AFTER_S:
            return
        for client in leases.queue:
            if not client.is_told:
                client.is_told = True
                client.send({"type": "waiting", "text": who_has_the_lease(leases)})
        if quiet_s > TAKE_AFTER_S and leases.queue:
            generation, following = leases.generation, leases.queue[0]
            holder = leases.lose()
            assert holder is not None
            log.warning("process %d gave no sign of life for %.0f s and has lost its lease", holder.pid, quiet_s)
            # It hears of it when it goes on. Its connection stays: it may ask for another lease.
            reason = why_taken(self._folder.name, quiet_s, following)
            holder.send({"type": "lost", "reason": reason, "failure": None, "restarts": False})
            self._membership.broadcast({"type": "leave", "generation": generation})
            self.advance()

    # Who is told that it won't be let in

    def lose(self, reason: str, cause: Cause | None) -> None:
        """The workers are gone: tell the holder why. cause: the failure that caused it, if one did."""
        holder = self.leases.lose()
        if holder is not None:
            told = {"failure": None} if cause is None else dataclasses.asdict(cause)
            holder.send({"type": "lost", "reason": reason, "restarts": True, **told})

    def refuse_all(self, reason: str) -> None:
        """Send all who wait away."""
        for client in self.leases.queue:
            client.send({"type": "refused", "reason": reason})
        self.leases.queue.clear()

    def refuse_in_vain(self) -> None:
        """Send those away who waited long enough for machines that aren't there."""
        now = time.monotonic()
        for client in list(self.leases.queue):
            since = max(client.waiting_since, self._membership.started_at)
            if (missing := self._missing()) and now - since > ABSENT_LIMIT_S:
                self.leases.queue.remove(client)
                client.send({"type": "refused", "reason": missing})

    def overdue(self) -> str | None:
        """A sentence when the group for the next client takes too long."""
        leases = self.leases
        limit_s = {"preparing": PREPARE_LIMIT_S, "joining": JOIN_LIMIT_S}.get(leases.phase)
        if limit_s is None or time.monotonic() - leases.phase_since <= limit_s:
            return None
        if leases.phase == "joining" and all(w.joined == leases.generation for w in self._membership.workers.values()):
            # Only the client is awaited.
            self._give_up_joining()
            return None
        return f"the workers were not free for the next client in {limit_s:.0f} s"
