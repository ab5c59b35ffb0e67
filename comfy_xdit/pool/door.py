"""The pool's door: a unix socket where clients take turns and workers report.

One thread owns all of the state. It moves no tensors: those go from the client to the workers over RPC.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from .folder import PoolFolder
from .roster import Roster, WorkerLine
from .turns import ClientLine, Turns
from .wire import Wire, versions

log = logging.getLogger("comfy_xdit")

TICK_S = 0.25
JOIN_LIMIT_S = 15.0
PREPARE_LIMIT_S = 120.0
"""How long a message whose client is gone or lost interest may run on before the workers restart."""

MAX_FAILED_STARTS = 3


class Door:
    """Listens in `folder` and judges; `stop` is called (from the door's thread) when a client asks for the end."""

    def __init__(
        self,
        folder: PoolFolder,
        devices: list[str],
        *,
        stop: Callable[[], None],
        kill_starting: Callable[[], None],
    ) -> None:
        """kill_starting: ends worker processes that have not come to the door."""
        self.folder = folder
        self.roster = Roster(devices)
        self.turns = Turns(generation=_last_generation(folder))
        self.residents: list[str] = []
        self.failed_starts = 0
        self.last_error = ""
        self.num_restarts = 0
        self._stop, self._kill_starting = stop, kill_starting
        self._started_at = self._ticked_at = time.monotonic()
        self._message = ""
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder.door))
        os.chmod(folder.door, 0o600)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def run(self) -> None:
        """Serve for ever."""
        while True:
            ready = [(key.data, key.fileobj) for key, _ in self._selector.select(TICK_S)]
            # Workers first: a client that acts on a worker's answer must find its report already judged.
            for line, _ in sorted(ready, key=lambda item: not isinstance(item[0], WorkerLine)):
                if line is None:
                    self._accept()
                else:
                    self._read(line)
            self._tick()

    # Connections

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            wire = Wire(sock)
            _, uid = wire.peer()
            if uid != os.getuid():
                wire.close()
                return
            self._selector.register(sock, selectors.EVENT_READ, wire)

    def _read(self, line: Wire | WorkerLine | ClientLine) -> None:
        wire = line if isinstance(line, Wire) else line.wire
        if wire.fileno() < 0:
            return
        try:
            messages = wire.read()
        except ConnectionError:
            self._closed(line)
            return
        except ValueError as error:
            log.warning("door: dropped a connection that sent %s", error)
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

    def _hello(self, wire: Wire, message: dict[str, Any]) -> Wire | WorkerLine | ClientLine:
        """The line of a newcomer that said who it is; the wire itself, closed, for any other."""
        kind = message.get("type")
        line: WorkerLine | ClientLine | None = None
        try:
            if kind == "status":
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
                    self._welcome_worker(line)
        except ConnectionError:
            line = None
        if line is None:
            self._drop(wire)
            return wire
        self._selector.modify(wire.sock, selectors.EVENT_READ, line)
        return line

    def _welcome_worker(self, worker: WorkerLine) -> None:
        roster = self.roster
        worker.wire.send(
            {
                "type": "welcome",
                "pool": self.folder.name,
                "store": str(self.folder.ranks_store(roster.attempt)),
                "devices": roster.devices,
                "residents": self.residents if self.failed_starts < MAX_FAILED_STARTS - 1 else [],
            }
        )

    def _drop(self, wire: Wire) -> None:
        if wire.fileno() >= 0:
            self._selector.unregister(wire.sock)
            wire.close()

    def _closed(self, line: Wire | WorkerLine | ClientLine) -> None:
        self._drop(line if isinstance(line, Wire) else line.wire)
        if isinstance(line, WorkerLine):
            if self.roster.workers.get(line.rank) is line:
                self._lose(f"{self.roster.label(line)} ended unexpectedly")
        elif isinstance(line, ClientLine) and self.turns.forget(line):
            # Its job is dropped and what it held is freed; the workers themselves stay as they are.
            self.roster.broadcast({"type": "leave", "generation": self.turns.generation})
            self._advance()

    # Workers

    def _worker_said(self, worker: WorkerLine, message: dict[str, Any]) -> None:
        kind, generation = message.get("type"), message.get("generation")
        worker.heard_at = time.monotonic()
        if kind == "beat":
            worker.status = message.get("status", {})
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
        """End all workers, so that the elastic agent starts new ones, and tell the holder why."""
        if self._stopping:
            return
        if not self.roster.is_ready:
            self.failed_starts += 1
        self.num_restarts += 1
        log.warning("%s; the workers are restarted", reason)
        workers = list(self.roster.workers.values())
        self.roster.kill()
        self._kill_starting()
        for worker in workers:
            self._drop(worker.wire)
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
        elif client is turns.holder and turns.phase == "open":
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
        store = self.folder.rpc_store(turns.generation)
        store.unlink(missing_ok=True)
        join = {"type": "join", "generation": turns.generation, "store": str(store)}
        self.roster.broadcast(join)
        turns.holder.send(join)

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
                self._drop(holder.wire)
            self._advance()

    # Time

    def _tick(self) -> None:
        now = time.monotonic()
        late, self._ticked_at = now - self._ticked_at - TICK_S, now
        if late > 1.0:
            # We were held up ourselves, so silence says nothing about the workers.
            for worker in self.roster.workers.values():
                worker.heard_at += late
        reason = self.roster.hung()
        if reason is None and self.turns.phase in ("preparing", "joining"):
            limit_s = JOIN_LIMIT_S if self.turns.phase == "joining" else PREPARE_LIMIT_S
            if now - self.turns.phase_since > limit_s:
                reason = f"the workers were not free for the next client in {limit_s:.0f} s"
        if reason is not None:
            self._lose(reason)
        else:
            self._judge()

    # Reports

    def _about(self) -> dict[str, Any]:
        return {
            "name": self.folder.name,
            "versions": versions(),
            "pid": os.getpid(),
            "devices": self.roster.devices,
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
            "residents": self.residents,
            **self.turns.describe(),
            "ranks": self.roster.describe(),
        }


def _last_generation(folder: PoolFolder) -> int:
    try:
        return int(folder.counter.read_text())
    except (OSError, ValueError):
        return 0
