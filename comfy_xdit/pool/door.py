"""The pool's door: a unix socket where clients take turns and workers report.

Workers of other machines report over TCP, where nothing but their greeting is taken from a newcomer.
One thread owns all of the state. It moves no tensors: those go from the client to the workers over RPC.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from .connections import Connections, Line, listener_at, listener_on
from .folder import PoolFolder
from .gathering import Gathering
from .network import LOOPBACK, Network
from .roster import Roster, WorkerLine
from .stores import FileStores, SharedStores
from .turns import ClientLine, Turns
from .wire import Wire, versions

log = logging.getLogger("comfy_xdit")

TICK_S = 0.25
JOIN_LIMIT_S = 15.0
PREPARE_LIMIT_S = 120.0
"""How long a message whose client is gone or lost interest may run on before the workers restart."""

MAX_FAILED_STARTS = 3
LONGEST_PAUSE_S = 30.0

ABSENT_LIMIT_S = 60.0
"""How long a client waits for machines that aren't there."""


class Door:
    """Listens in `folder` and judges; `stop` is called (from the door's thread) when a client asks for the end."""

    def __init__(
        self,
        folder: PoolFolder,
        devices: list[str],
        *,
        stop: Callable[[], None],
        kill_starting: Callable[[], None],
        network: Network | None = None,
    ) -> None:
        """kill_starting: ends worker processes that have not come to the door. network: between the machines of
        the pool, where workers come from then; None for one machine. Raises PoolError when its port is taken.
        """
        self.folder = folder
        self.network = network
        self.roster = Roster(devices, network)
        self.turns = Turns(generation=folder.last_generation())
        self.residents: list[str] = []
        self.failed_starts = 0
        self.last_error = ""
        self.num_restarts = 0
        self._stop, self._kill_starting = stop, kill_starting
        self._started_at = self._ticked_at = time.monotonic()
        self._message = ""
        self._stopping = False
        self._connections = Connections()
        self._gathering = Gathering(folder.name, devices, network) if network else None
        self._stores = SharedStores(network.address) if network else FileStores(folder)
        if network is not None:
            self._connections.listen(listener_on(network))
        self._connections.listen(listener_at(folder.door))

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for line in self._connections.wait(TICK_S):
                self._read(line)
            self._tick()

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next attempt: none after a working one, then more and more."""
        return 0.0 if self.failed_starts < 2 else min(LONGEST_PAUSE_S, 0.5 * 2.0**self.failed_starts)

    @property
    def has_workers(self) -> bool:
        """Whether any is connected; any thread may ask."""
        return bool(self.roster.workers or (self._gathering and self._gathering.waiting))

    def dismiss(self) -> None:
        """Tell the workers of other machines that this is the end, so that their torchruns end too. Any thread."""
        self._stopping = True
        if self._gathering is not None:
            self._gathering.dismiss(self.roster.workers)

    # Connections

    def _read(self, line: Line) -> None:
        messages = self._connections.read(line)
        if messages is None:
            self._closed(line)
            return
        try:
            for message in messages:
                if isinstance(line, Wire):
                    line = self._hello(line, message)
                    if isinstance(line, Wire):
                        return
                elif isinstance(line, WorkerLine):
                    self._worker_said(line, message)
                else:
                    self._client_said(line, message)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("door: dropped a connection that sent a malformed message (%r)", error)
            self._closed(line)

    def _hello(self, wire: Wire, message: dict[str, Any]) -> Line:
        """The line of a newcomer that said who it is; the wire itself, closed, for any other."""
        kind = message.get("type")
        line: WorkerLine | ClientLine | None = None
        try:
            if wire.is_remote and self._gathering is not None:
                line = self._gathering.greet(wire, message, self.roster.workers)
            elif kind == "status":
                wire.send(self.status())
            elif kind == "stop":
                wire.send({"type": "stopping"})
                log.info("stopping: asked by process %d", wire.peer()[0])
                self._stopping = True
                self._stop()
            elif kind == "client":
                line = ClientLine(wire=wire, pid=wire.peer()[0])
                wire.send({"type": "welcome", **self._about()})
            elif kind == "worker":
                line = self.roster.admit(wire, message)
                if line is not None:
                    self._welcome_worker(line, self._stores.for_ranks(self.roster.attempt))
        except ConnectionError:
            line = None
        if line is None:
            self._connections.drop(wire)
            return wire
        self._connections.become(wire, line)
        return line

    def _begin_when_gathered(self) -> None:
        if self._gathering is None or self._stopping or self.roster.workers:
            return
        is_pause = time.monotonic() < self.roster.started_at + self.pause_s
        if is_pause or not (workers := self._gathering.take()):
            return
        self.roster.begin(workers)
        store = self._stores.for_ranks(self.roster.attempt)
        for worker in workers.values():
            self._welcome_worker(worker, store)

    def _welcome_worker(self, worker: WorkerLine, store: str) -> None:
        worker.send(
            {
                "type": "welcome",
                "pool": self.folder.name,
                "store": store,
                "rank": worker.rank,
                "devices": self.roster.devices,
                "residents": self.residents if self.failed_starts < MAX_FAILED_STARTS - 1 else [],
            }
        )

    def _closed(self, line: Line) -> None:
        self._connections.drop(line)
        if isinstance(line, WorkerLine):
            if self._gathering is not None:
                self._gathering.leave(line)
            if self.roster.workers.get(line.rank) is not line:
                return
            if self._stopping:
                del self.roster.workers[line.rank]
            else:
                self._lose(f"{self.roster.label(line)} ended unexpectedly")
        elif isinstance(line, ClientLine) and self.turns.forget(line):
            # Its job is dropped and what it held is freed; the workers themselves stay as they are.
            self.roster.broadcast({"type": "leave", "generation": self.turns.generation})
            self._advance()

    # Workers

    def _worker_said(self, worker: WorkerLine, message: dict[str, Any]) -> None:
        kind, generation = message.get("type"), message.get("generation")
        worker.heard_at = time.monotonic()
        if self.roster.workers.get(worker.rank) is not worker:
            # It waits for the others.
            return
        if kind == "beat":
            worker.status = message.get("status", {})
        elif kind == "met":
            worker.has_met = True
        elif kind == "up":
            worker.is_up = True
            self._advance_when_ready()
        elif kind == "failed":
            self.last_error = str(message.get("message"))
        elif kind == "residents":
            self.residents = list(message.get("messages", []))
        elif kind == "began":
            worker.running = self._message = str(message.get("message"))
        elif kind == "done":
            worker.running = None
            worker.done = (int(message["generation"]), int(message["serial"]))
            worker.failure, worker.done_at = message.get("failure"), time.monotonic()
            self._judge()
        elif kind == "prepared" and generation == self.turns.generation:
            worker.prepared = generation
            self._join_when_prepared()
        elif kind in ("joined", "join_failed") and generation == self.turns.generation:
            setattr(worker, str(kind), generation)
            self._open_when_joined()

    def _judge(self) -> None:
        failure = self.roster.broken(self._message)
        if failure is not None:
            self._lose(f"rank {failure['rank']} failed in {self._message}", failure=failure)

    def _advance_when_ready(self) -> None:
        if self.roster.is_ready:
            log.info("all %d workers are up (attempt %d)", len(self.roster.devices), self.roster.attempt)
            self.failed_starts = 0
            self.last_error = ""
            self._advance()

    def _lose(self, reason: str, *, failure: dict[str, Any] | None = None) -> None:
        """End all workers, so that new ones are started, and tell the holder why."""
        if self._stopping:
            return
        if not self.roster.is_ready:
            self.failed_starts += 1
            self.last_error = self.last_error or reason
        self.num_restarts += 1
        log.warning("%s; the workers are restarted", reason)
        workers = list(self.roster.workers.values())
        self.roster.kill()
        self._kill_starting()
        for worker in workers:
            self._connections.drop(worker)
        self.roster.workers = {}
        self.roster.started_at = time.monotonic()
        holder = self.turns.lose()
        if holder is not None:
            holder.send({"type": "lost", "reason": reason, "failure": failure})
        self._refuse_when_hopeless()

    def _refuse_when_hopeless(self) -> None:
        if self.failed_starts < MAX_FAILED_STARTS:
            return
        why = self.last_error or "they ended before they were up"
        for client in self.turns.queue:
            client.send(
                {
                    "type": "refused",
                    "reason": f"the workers of pool {self.folder.name!r} failed to start "
                    f"{self.failed_starts} times: {why}; see {self.folder.log}",
                }
            )
        self.turns.queue.clear()

    @property
    def _missing(self) -> str:
        return "" if self._gathering is None or self.roster.workers else self._gathering.missing()

    def _refuse_in_vain(self, now: float) -> None:
        """Who waited long enough for machines that aren't there."""
        for client in list(self.turns.queue):
            if (missing := self._missing) and now - max(client.waiting_since, self.roster.started_at) > ABSENT_LIMIT_S:
                self.turns.queue.remove(client)
                client.send({"type": "refused", "reason": missing})

    # Clients

    def _client_said(self, client: ClientLine, message: dict[str, Any]) -> None:
        turns, kind, generation = self.turns, message.get("type"), message.get("generation")
        if kind == "turn":
            if turns.ask(client, generation):
                client.send({"type": "grant", "generation": turns.generation})
            else:
                self._advance()
        elif kind == "end":
            self._end_turn(client)
        elif kind == "joined" and generation == turns.generation:
            client.joined = int(message["generation"])
            self._open_when_joined()
        elif kind == "restart" and client is turns.holder and generation == turns.generation:
            self._lose(str(message.get("reason")))

    def _end_turn(self, client: ClientLine) -> None:
        turns = self.turns
        if client in turns.queue:
            turns.queue.remove(client)
        if client is turns.holder and turns.phase == "open":
            turns.in_turn = False
            self._advance()
        elif turns.forget(client):
            # It lost interest while its group was being made.
            self._advance()

    def _advance(self) -> None:
        """Let the next client in, if there is one and the workers are free for it."""
        if self.turns.is_busy or not self.turns.queue or not self.roster.is_ready:
            self._refuse_when_hopeless()
            return
        self.turns.next()
        self.folder.counter.write_text(str(self.turns.generation))
        self.roster.broadcast({"type": "prepare", "generation": self.turns.generation})

    def _join_when_prepared(self) -> None:
        turns, workers = self.turns, self.roster.workers.values()
        if turns.phase != "preparing" or any(w.prepared != turns.generation for w in workers):
            return
        if turns.holder is None:
            turns.enter("none")
            self._advance()
            return
        turns.enter("joining")
        store = self._stores.for_rpc(turns.generation)
        join = {"type": "join", "generation": turns.generation, "store": store}
        self.roster.broadcast(join)
        turns.holder.send({**join, "interface": self.network.interface if self.network else LOOPBACK})

    def _open_when_joined(self) -> None:
        turns, workers = self.turns, list(self.roster.workers.values())
        generation = turns.generation
        if turns.phase != "joining" or any(generation not in (w.joined, w.join_failed) for w in workers):
            return
        holder = turns.holder
        if (
            holder is not None
            and holder.joined == generation
            and all(w.joined == generation for w in workers)
        ):
            turns.open()
            holder.send({"type": "grant", "generation": generation})
            return
        if holder is None or any(w.join_failed == generation for w in workers):
            # The client went away, or stopped, while joining. The workers are sound and stay.
            turns.enter("none")
            if holder is not None:
                turns.forget(holder)
                self._connections.drop(holder)
            self._advance()

    # Time

    def _tick(self) -> None:
        now = time.monotonic()
        late, self._ticked_at = now - self._ticked_at - TICK_S, now
        if late > 1.0:
            # We were held up ourselves, so silence says nothing about the workers.
            waiting = self._gathering.waiting.values() if self._gathering else ()
            for worker in (*self.roster.workers.values(), *waiting):
                worker.heard_at += late
        reason = self.roster.hung()
        limit_s = {"preparing": PREPARE_LIMIT_S, "joining": JOIN_LIMIT_S}.get(self.turns.phase)
        if reason is None and limit_s is not None and now - self.turns.phase_since > limit_s:
            reason = f"the workers were not free for the next client in {limit_s:.0f} s"
        if reason is not None:
            self._lose(reason)
        else:
            self._judge()
        for line in self._gathering.silent() if self._gathering else ():
            self._closed(line)
        self._begin_when_gathered()
        self._refuse_in_vain(now)

    # Reports

    def _about(self) -> dict[str, Any]:
        return {
            "name": self.folder.name,
            "versions": versions(),
            "pid": os.getpid(),
            "devices": self.roster.devices,
            "network": self.network.fields if self.network else None,
            "log": str(self.folder.log),
        }

    def status(self) -> dict[str, Any]:
        """What `pool status --json` shows."""
        if self.roster.is_ready:
            state = "busy" if self.turns.in_turn else "ready"
        else:
            state = "failing" if self.failed_starts >= MAX_FAILED_STARTS else "starting"
        return {
            "type": "status",
            **self._about(),
            "state": state,
            "uptime_s": round(time.monotonic() - self._started_at, 1),
            "num_restarts": self.num_restarts,
            "last_error": self.last_error,
            "missing": self._missing,
            "residents": self.residents,
            **self.turns.describe(),
            "ranks": self.roster.describe(),
        }
