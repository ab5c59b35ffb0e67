"""What the supervisor knows of the workers of the present attempt, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import Any

from .verdict import LOCAL, STUCK_AFTER_S, groups_survive, worst
from .wire import Wire

HEARTBEAT_TIMEOUT_S = 10.0
STARTING_HEARTBEAT_TIMEOUT_S = 60.0
"""For a worker that is not up yet: loading torch's libraries from a cold disk stops all of its threads."""

START_TIMEOUT_S = 120.0
"""From the start of the processes to their first word; loading what they held comes after that."""


@dataclasses.dataclass
class WorkerLine:
    """The connection of one worker, and the last that it said."""

    wire: Wire
    rank: int
    pid: int
    heard_at: float
    is_up: bool = False
    status: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepared: int = 0
    joined: int = 0
    join_failed: int = 0
    running: str | None = None
    done: tuple[int, int] = (0, 0)
    """Generation and serial number of the last message that it ended."""
    failure: dict[str, Any] | None = None
    """The fields of the `Failure` that it ended with."""
    done_at: float = 0.0


class Roster:
    """The workers of one attempt of the elastic agent: none, some or all of `devices` are connected."""

    def __init__(self, devices: list[str]) -> None:
        self.devices = devices
        self.attempt = -1
        self.workers: dict[int, WorkerLine] = {}
        self.started_at = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Every rank has its process groups, its service and what was resident before."""
        return len(self.workers) == len(self.devices) and all(w.is_up for w in self.workers.values())

    def admit(self, wire: Wire, hello: dict[str, Any]) -> WorkerLine | None:
        """The new worker's line; None when it belongs to an attempt that is over or to no rank."""
        rank, attempt, (pid, _) = hello.get("rank"), hello.get("attempt"), wire.peer()
        if not isinstance(rank, int) or not isinstance(attempt, int) or not 0 <= rank < len(self.devices):
            return None
        if attempt < self.attempt or (attempt == self.attempt and rank in self.workers):
            return None
        if attempt > self.attempt:
            self.attempt, self.workers = attempt, {}
        self.workers[rank] = WorkerLine(wire=wire, rank=rank, pid=pid, heard_at=time.monotonic())
        return self.workers[rank]

    def broadcast(self, message: dict[str, Any]) -> None:
        for worker in list(self.workers.values()):
            try:
                worker.wire.send(message)
            except ConnectionError:
                # Its socket reports the end to the door, which then acts on it.
                continue

    def label(self, worker: WorkerLine) -> str:
        return f"worker {worker.rank} (pid {worker.pid}, {self.devices[worker.rank]})"

    def hung(self) -> str | None:
        """A sentence about a worker that stopped talking, if there is one."""
        now = time.monotonic()
        for worker in self.workers.values():
            limit_s = HEARTBEAT_TIMEOUT_S if worker.is_up else STARTING_HEARTBEAT_TIMEOUT_S
            if now - worker.heard_at > limit_s:
                return f"{self.label(worker)} gave no sign of life for {limit_s:.0f} s"
        if len(self.workers) < len(self.devices) and now - self.started_at > START_TIMEOUT_S:
            return f"{len(self.devices) - len(self.workers)} workers did not start in {START_TIMEOUT_S:.0f} s"
        return None

    def broken(self, message: str) -> dict[str, Any] | None:
        """The failure to tell, when the ranks ended `message` in ways that leave their groups unusable."""
        workers = list(self.workers.values())
        last = max((w.done for w in workers), default=(0, 0))
        ended = [w for w in workers if w.done == last]
        failed = [w for w in ended if w.failure is not None]
        if not failed:
            return None
        if len(ended) == len(workers):
            sound = groups_survive(message, [w.failure["kind"] if w.failure else None for w in workers])
        else:
            late_s = time.monotonic() - min(w.done_at for w in failed)
            sound = late_s < STUCK_AFTER_S or message in LOCAL
        return None if sound else worst([w.failure for w in failed if w.failure is not None])

    def kill(self) -> None:
        """End every connected worker at once, also one that is stopped or stuck in a collective.

        Safe against reuse of a pid: one whose connection is open is alive.
        """
        for worker in self.workers.values():
            try:
                os.kill(worker.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def describe(self) -> list[dict[str, Any]]:
        """One dict per rank, for `pool status`."""
        ranks = []
        for rank, device in enumerate(self.devices):
            worker = self.workers.get(rank)
            entry: dict[str, Any] = {"rank": rank, "device": device, "pid": None, "state": "starting"}
            if worker is not None:
                state = "starting" if not worker.is_up else ("busy" if worker.running else "idle")
                entry |= {**worker.status, "pid": worker.pid, "state": state, "running": worker.running}
            ranks.append(entry)
        return ranks
