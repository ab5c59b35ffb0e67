"""The pool's coordinator: a unix socket where clients take leases and workers report.

Workers of other machines report over TCP, where nothing but their greeting is taken from a newcomer.
One thread owns all of the state. It moves no tensors: those go straight from the client to the workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from . import trial
from .connections import Connections, Line, Newcomer, listener_on
from .endpoint import Endpoint
from .environment import Changes
from .errors import PoolError
from .fields import Malformed, integer, named_texts, table, text, texts
from .folder import PoolFolder, unwritable
from .grants import Grants
from .handshake import Challenge, challenges
from .judge import Cause, Judge, Keep, Restart
from .leases import ClientLine
from .locks import Lock
from .membership import Membership, WorkerLine, failure_of
from .network import Network
from .pace import Pace
from .rendezvous import Rendezvous
from .report import about, report
from .starts import Starts
from .stores import FileStores, SharedStores
from .transport import RPC, SOCKETS
from .trial import step_of

log = logging.getLogger("comfy_xdit")

TICK_S = 0.25


class Coordinator:
    """Listens in `folder` and judges; `stop` is called (from its own thread) when a client asks for the end."""

    def __init__(
        self,
        folder: PoolFolder,
        devices: list[str],
        *,
        lock: Lock,
        stop: Callable[[], None],
        kill_starting: Callable[[], None],
        network: Network | None = None,
        transport: str = SOCKETS,
    ) -> None:
        """lock: the folder's "alive", taken. kill_starting: ends worker processes that have not reported yet.
        network: between the machines of the pool, where workers come from then; None for one machine.
        transport: between client and workers, RPC where there is a network.
        Raises PoolError when its port is taken or the folder can't be written.
        """
        self.folder = folder
        self.network, self.transport = network, RPC if network else transport
        self.membership = Membership(devices, network)
        # The last used last.
        self.residents: list[str] = []
        self._setup: list[str] = []
        self.changes = Changes(replaced={}, dropped={})
        """What the workers' environment has not of this process'."""
        self.pace, self.starts = Pace(), Starts()
        self.num_restarts = 0
        self._stop, self._kill_starting = stop, kill_starting
        self.started_at = self._ticked_at = time.monotonic()
        self._judge = Judge(self.membership)
        self._stopping = False
        self._connections = Connections(challenges(folder.key, network.coordinator) if network else None)
        self._rendezvous = Rendezvous(folder.name, devices, network) if network else None
        self._stores = SharedStores(network.address) if network else FileStores(folder)
        self.grants = Grants(
            folder, self.membership, self._connections, self._stores, self.transport, missing=lambda: self.missing
        )
        if network is not None:
            self._connections.listen(listener_on(network))
        self._endpoint = Endpoint(folder, lock, self._connections)
        try:
            self._endpoint.open()
        except OSError as error:
            raise unwritable(folder, error) from None

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for line in self._connections.wait(TICK_S):
                self._read(line)
            self._tick()

    @property
    def has_workers(self) -> bool:
        """Whether any is connected; any thread may ask."""
        return bool(self.membership.workers or (self._rendezvous and self._rendezvous.waiting))

    def dismiss(self) -> None:
        """Tell the workers of other machines that this is the end, so that their torchruns end too. Any thread."""
        self._stopping = True
        if self._rendezvous is not None:
            self._rendezvous.dismiss(self.membership.workers)

    def _end(self, why: str) -> None:
        log.warning("the pool ends: %s", why)
        self._stopping = True
        self._stop()

    # Connections

    def _read(self, line: Line) -> None:
        messages = self._connections.read(line)
        if messages is None:
            self._closed(line)
            return
        try:
            for message in messages:
                if isinstance(line, Newcomer):
                    known = self._newcomer_said(line, message)
                    if known is None:
                        return
                    line = known
                elif isinstance(line, WorkerLine):
                    self._worker_said(line, message)
                else:
                    self._client_said(line, message)
        except Malformed as error:
            log.warning("coordinator: dropped a connection: %s", error)
            self._closed(line)
        except Exception:
            # Whatever a peer's words lead to, it is that peer who goes, and never the pool.
            log.exception("coordinator: dropped a connection whose words could not be dealt with")
            self._closed(line)

    def _newcomer_said(self, newcomer: Newcomer, message: dict[str, Any]) -> Line | None:
        """The line of one that said who it is, or is still to say it; None for one that was sent away."""
        line: Line | None = None
        try:
            if newcomer.challenge is not None:
                return self._proven(newcomer, newcomer.challenge, message)
            line = self._hello(newcomer, message)
        except ConnectionError:
            line = None
        if line is None:
            self._connections.drop(newcomer)
        else:
            self._connections.become(newcomer, line)
        return line

    def _proven(self, newcomer: Newcomer, challenge: Challenge, message: dict[str, Any]) -> Newcomer:
        try:
            newcomer.wire.send(challenge.answer(message))
        except Malformed as error:
            newcomer.wire.send({"type": "refused", "reason": str(error)})
            raise
        newcomer.challenge = None
        return newcomer

    def _hello(self, newcomer: Newcomer, message: dict[str, Any]) -> WorkerLine | ClientLine | None:
        wire, kind = newcomer.wire, text(message, "type")
        if self._rendezvous is not None and wire.is_remote:
            return self._rendezvous.greet(wire, message, self.membership.workers)
        if kind == "status":
            wire.send(report(self))
        elif kind == "stop":
            wire.send({"type": "stopping"})
            self._end(f"asked by process {wire.peer()[0]}")
        elif kind == "client":
            wire.send({"type": "welcome", **about(self)})
            return ClientLine(wire=wire, pid=wire.peer()[0])
        elif kind == "worker":
            return self._admit(newcomer, message)
        return None

    def _admit(self, newcomer: Newcomer, message: dict[str, Any]) -> WorkerLine | None:
        worker = self.membership.admit(newcomer.wire, message)
        if worker is None:
            return None
        try:
            self._welcome_worker(worker, self._stores.for_ranks(self.membership.attempt))
            return worker
        except PoolError as error:
            self._lose(str(error))
            return None

    def _begin_when_met(self) -> None:
        if self._rendezvous is None or self._stopping or self.starts.held or self.membership.workers:
            return
        is_pause = time.monotonic() < self.membership.started_at + self.pace.pause_s
        if is_pause or not (workers := self._rendezvous.take()):
            return
        self.pace.began()
        self.membership.begin(workers)
        store = self._stores.for_ranks(self.membership.attempt)
        for worker in workers.values():
            self._welcome_worker(worker, store)

    def _welcome_worker(self, worker: WorkerLine, store: str) -> None:
        worker.send(
            {
                "type": "welcome",
                "pool": self.folder.name,
                "store": store,
                "rank": worker.rank,
                "devices": self.membership.devices,
                "residents": [*self._setup, *self.residents] if self.starts.loads_residents else [],
            }
        )

    def _closed(self, line: Line) -> None:
        self._connections.drop(line)
        if isinstance(line, WorkerLine):
            if self._rendezvous is not None:
                self._rendezvous.leave(line)
            if self.membership.workers.get(line.rank) is not line:
                return
            if self._stopping:
                del self.membership.workers[line.rank]
            else:
                self._lose(f"{self.membership.label(line)} ended unexpectedly")
        elif isinstance(line, ClientLine):
            self.grants.left(line)

    # Workers

    def _worker_said(self, worker: WorkerLine, message: dict[str, Any]) -> None:
        kind = text(message, "type")
        worker.heard_at = time.monotonic()
        if self.membership.workers.get(worker.rank) is not worker:
            # It waits for the others.
            return
        if kind == "beat":
            worker.status = table(message, "status")
        elif kind == "met":
            worker.has_met = True
        elif kind == "trying":
            worker.step = step_of(message, len(self.membership.devices))
        elif kind == "trial_failed":
            self._trial_failed(worker, message)
        elif kind == "tried":
            worker.has_tried = True
        elif kind == "up":
            worker.is_up = True
            worker.environment = named_texts(message, "environment")
            self._advance_when_ready()
        elif kind == "failed":
            self.starts.last_error = text(message, "message")
        elif kind == "residents":
            self._setup, self.residents = texts(message, "setup"), texts(message, "messages")
        elif kind == "began":
            worker.running = text(message, "message")
        elif kind == "done":
            failure = failure_of(message, len(self.membership.devices))
            self._judge.ended(worker, (integer(message, "generation"), integer(message, "serial")), failure)
            worker.running = None
            if failure is None:
                self.pace.worked()
            self._settle()
        elif kind in ("prepared", "joined", "join_failed"):
            setattr(worker, kind, integer(message, "generation"))
            self.grants.join_when_prepared()
            self.grants.open_when_joined()

    def _trial_failed(self, worker: WorkerLine, message: dict[str, Any]) -> None:
        raised, devices = text(message, "raised"), self.membership.devices
        sentence = trial.failed(step_of(message, len(devices)), worker.rank, raised, devices)
        if not raised or self.starts.has_raised_too_often():
            self._hold(sentence)
        else:
            self._lose(sentence)

    def _hold(self, why: str) -> None:
        """End all workers, and start none before a client asks again: it would end the same way."""
        self.starts.hold(why)
        self._lose(why)

    def _release(self) -> None:
        if self.starts.release():
            self.membership.started_at = time.monotonic()

    def _settle(self) -> None:
        """Act on what the judge says."""
        holder = self.grants.leases.holder
        if holder is None:
            self._judge.forget()
        found = self._judge.look()
        if isinstance(found, Restart):
            self._lose(found.reason, cause=found.cause)
        elif isinstance(found, Keep) and holder is not None:
            holder.send({"type": "keep", "generation": found.generation, "serial": found.serial})

    def _advance_when_ready(self) -> None:
        if self.membership.is_ready:
            log.info("all %d workers are up (attempt %d)", len(self.membership.devices), self.membership.attempt)
            self.starts.worked()
            self.grants.advance()

    def _lose(self, reason: str, *, cause: Cause | None = None) -> None:
        """End all workers, so that new ones are started, and tell the holder why."""
        if self._stopping:
            return
        if not self.membership.is_ready:
            self.starts.failed(reason)
        self.num_restarts += 1
        if cause is not None and cause.failure["kind"] == "memory":
            # All of it filled the devices, and would again: only what is in use comes back.
            self.residents = self.residents[-1:]
        log.warning("%s; the workers are %s", reason, "ended" if self.starts.held else "restarted")
        cause = cause or self._judge.cause()
        self._judge.renew()
        workers = list(self.membership.workers.values())
        self.membership.kill()
        self._kill_starting()
        for worker in workers:
            self._connections.drop(worker)
        self.membership.workers = {}
        self.membership.started_at = time.monotonic()
        self.grants.lose(reason, cause)
        self._refuse_when_hopeless()

    def _refuse_when_hopeless(self) -> None:
        if reason := self.starts.hopeless(self.folder.name):
            self.grants.refuse_all(reason)

    @property
    def missing(self) -> str:
        """Which workers of other machines aren't there, in a sentence; "" when all are."""
        return "" if self._rendezvous is None or self.membership.workers else self._rendezvous.missing()

    # Clients

    def _client_said(self, client: ClientLine, message: dict[str, Any]) -> None:
        kind = text(message, "type")
        client.heard_at = time.monotonic()
        if kind == "end":
            self.grants.ended(client)
        if kind in ("end", "beat"):
            return
        generation, leases = integer(message, "generation"), self.grants.leases
        if kind == "lease":
            self._release()
            self.grants.asked(client, generation)
            self._refuse_when_hopeless()
        elif kind == "joined" and generation == leases.generation:
            client.joined = generation
            self.grants.open_when_joined()
        elif kind == "restart" and client is leases.holder and generation == leases.generation:
            self._lose(text(message, "reason"))
        elif kind == "judge" and client is leases.holder and generation == leases.generation:
            serial, is_broken = integer(message, "serial"), bool(message.get("is_broken"))
            self._judge.ask(generation, serial, is_broken=is_broken)
            self._settle()

    # Time

    def _tick(self) -> None:
        now = time.monotonic()
        late, self._ticked_at = now - self._ticked_at - TICK_S, now
        if late > 1.0:
            # We were held up ourselves, so silence says nothing about the others.
            waiting = self._rendezvous.waiting.values() if self._rendezvous else ()
            holder = self.grants.leases.holder
            for line in (*self.membership.workers.values(), *waiting, *([holder] if holder else ())):
                line.heard_at += late
        if not self.starts.held:
            if overdue := self.membership.untried():
                self._hold(overdue)
            elif reason := self.membership.hung() or self.grants.overdue():
                self._lose(reason)
            else:
                self._settle()
        for line in self._rendezvous.silent() if self._rendezvous else ():
            self._closed(line)
        self._connections.drop_slow()
        self._stay()
        self._begin_when_met()
        self.grants.refuse_in_vain()
        self.grants.watch()

    def _stay(self) -> None:
        """Be where clients look, or end; and have the workers find each other."""
        try:
            self._endpoint.keep(self.grants.leases.generation)
        except PoolError as error:
            self._end(str(error))
            return
        if self.membership.is_ready and not self._stores.is_whole(self.membership.attempt):
            # The next group that they make would wait for it for ever.
            self._lose("the file through which the workers find each other was deleted")
