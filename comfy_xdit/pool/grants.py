"""Lets one client after the other in: a turn for its head of the queue, a group of it and the workers, a grant."""

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
from .network import LOOPBACK
from .roster import Roster
from .silence import TAKE_AFTER_S, TELL_AFTER_S, silent_s, who_has_the_turn, why_taken
from .stores import FileStores, SharedStores
from .transport import RPC
from .turns import ClientLine, Turns

log = logging.getLogger("comfy_xdit")

JOIN_LIMIT_S = 15.0
PREPARE_LIMIT_S = 120.0
"""How long a message whose client is gone or lost interest may run on before the workers restart."""

ABSENT_LIMIT_S = 60.0
"""How long a client waits for machines that aren't there."""


class Grants:
    """The clients of a pool. Belongs to the door's thread.

    missing: which workers of other machines aren't there, in a sentence; "" when all are.
    """

    def __init__(
        self,
        folder: PoolFolder,
        roster: Roster,
        connections: Connections,
        stores: FileStores | SharedStores,
        transport: str,
        *,
        missing: Callable[[], str],
    ) -> None:
        self._folder, self._roster = folder, roster
        self._connections, self._stores, self._transport = connections, stores, transport
        self._missing = missing
        self.turns = Turns(generation=folder.last_generation())

    # What clients and workers say

    def asked(self, client: ClientLine, generation: object) -> None:
        """A client wants a turn; `generation` is the group that it is in."""
        if self.turns.ask(client, generation):
            client.send({"type": "grant", "generation": self.turns.generation})
            return
        self.advance()
        if client in self.turns.queue and self.turns.in_turn:
            client.send({"type": "waiting", "text": who_has_the_turn(self.turns)})

    def ended(self, client: ClientLine) -> None:
        """A client's turn is over, or it waits for none any more."""
        turns = self.turns
        if client in turns.queue:
            turns.queue.remove(client)
        if client is turns.holder and turns.phase == "open":
            turns.in_turn = False
            self.advance()
        elif turns.forget(client):
            # It lost interest while its group was being made.
            self.advance()

    def left(self, client: ClientLine) -> None:
        """A client is gone."""
        if self.turns.forget(client):
            # Its job is dropped and what it held is freed; the workers themselves stay as they are.
            self._roster.broadcast({"type": "leave", "generation": self.turns.generation})
            self.advance()

    def advance(self) -> None:
        """Let the next client in, if there is one and the workers are free for it."""
        if self.turns.is_busy or not self.turns.queue or not self._roster.is_ready:
            return
        try:
            # First: a number that was used and not kept might return.
            self._folder.note_generation(self.turns.generation + 1)
        except OSError as error:
            self.refuse_all(str(unwritable(self._folder, error)))
            return
        self.turns.next()
        self._roster.broadcast({"type": "prepare", "generation": self.turns.generation})

    def join_when_prepared(self) -> None:
        """Have the group made, once all workers are free for it."""
        turns, workers = self.turns, self._roster.workers.values()
        if turns.phase != "preparing" or any(w.prepared != turns.generation for w in workers):
            return
        if turns.holder is None:
            turns.enter("none")
            self.advance()
            return
        turns.enter("joining")
        try:
            self._order_joining(turns.holder, turns.generation)
        except PoolError as error:
            turns.holder.send({"type": "refused", "reason": str(error)})
            turns.forget(turns.holder)
            turns.enter("none")
            self.advance()

    def _order_joining(self, holder: ClientLine, generation: int) -> None:
        """Tell client and workers to join. Raises PoolError when they have no place to."""
        join: dict[str, Any] = {"type": "join", "generation": generation, "transport": self._transport}
        if self._transport == RPC:
            join["store"] = self._stores.for_rpc(generation)
            self._roster.broadcast(join)
            network = self._roster.network
            holder.send({**join, "interface": network.interface if network else LOOPBACK})
            return
        workers = [worker for _, worker in sorted(self._roster.workers.items())]
        try:
            with pairs(len(workers)) as (client_ends, worker_ends):
                for worker, end in zip(workers, worker_ends, strict=True):
                    worker.send(join, [end.fileno()])
                holder.send(join, [end.fileno() for end in client_ends])
        except OSError as error:
            raise PoolError(f"no sockets between client and workers ({error.strerror})") from None

    def open_when_joined(self) -> None:
        """Grant the turn, once the group is made."""
        turns, workers = self.turns, list(self._roster.workers.values())
        generation = turns.generation
        if turns.phase != "joining" or any(generation not in (w.joined, w.join_failed) for w in workers):
            return
        holder = turns.holder
        if holder is not None and holder.joined == generation and all(w.joined == generation for w in workers):
            turns.open()
            holder.send({"type": "grant", "generation": generation})
            return
        if holder is None or any(w.join_failed == generation for w in workers):
            self._give_up_joining()

    def _give_up_joining(self) -> None:
        """The client went away, or stopped, while joining. The workers are sound and stay."""
        holder = self.turns.holder
        self.turns.enter("none")
        if holder is not None:
            self.turns.forget(holder)
            self._connections.drop(holder)
        self.advance()

    # A client that gives no sign of life

    def watch(self) -> None:
        """Tell those who wait of a client that has the turn and is silent; take the turn from it in the end."""
        turns, quiet_s = self.turns, silent_s(self.turns)
        if quiet_s < TELL_AFTER_S:
            return
        for client in turns.queue:
            if not client.is_told:
                client.is_told = True
                client.send({"type": "waiting", "text": who_has_the_turn(turns)})
        if quiet_s > TAKE_AFTER_S and turns.queue:
            generation, following = turns.generation, turns.queue[0]
            holder = turns.lose()
            assert holder is not None
            log.warning("process %d gave no sign of life for %.0f s and has lost its turn", holder.pid, quiet_s)
            # It hears of it when it goes on. Its connection stays: it may ask for another turn.
            reason = why_taken(self._folder.name, quiet_s, following)
            holder.send({"type": "lost", "reason": reason, "failure": None, "restarts": False})
            self._roster.broadcast({"type": "leave", "generation": generation})
            self.advance()

    # Who is told that it won't be let in

    def lose(self, reason: str, cause: Cause | None) -> None:
        """The workers are gone: tell the holder why. cause: the failure that caused it, if one did."""
        holder = self.turns.lose()
        if holder is not None:
            told = {"failure": None} if cause is None else dataclasses.asdict(cause)
            holder.send({"type": "lost", "reason": reason, "restarts": True, **told})

    def refuse_all(self, reason: str) -> None:
        """Send all who wait away."""
        for client in self.turns.queue:
            client.send({"type": "refused", "reason": reason})
        self.turns.queue.clear()

    def refuse_in_vain(self) -> None:
        """Send those away who waited long enough for machines that aren't there."""
        now = time.monotonic()
        for client in list(self.turns.queue):
            since = max(client.waiting_since, self._roster.started_at)
            if (missing := self._missing()) and now - since > ABSENT_LIMIT_S:
                self.turns.queue.remove(client)
                client.send({"type": "refused", "reason": missing})

    def overdue(self) -> str | None:
        """A sentence when the group for the next client takes too long."""
        turns = self.turns
        limit_s = {"preparing": PREPARE_LIMIT_S, "joining": JOIN_LIMIT_S}.get(turns.phase)
        if limit_s is None or time.monotonic() - turns.phase_since <= limit_s:
            return None
        if turns.phase == "joining" and all(w.joined == turns.generation for w in self._roster.workers.values()):
            # Only the client is awaited.
            self._give_up_joining()
            return None
        return f"the workers were not free for the next client in {limit_s:.0f} s"
