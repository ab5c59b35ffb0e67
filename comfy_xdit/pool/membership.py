"""What the supervisor knows of the workers of the present attempt, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from . import trial
from .failure_policy import SAID_FIRST
from .fields import integer, one_of, table, text
from .network import Network
from .wire import Wire

HEARTBEAT_TIMEOUT_S = 10.0
STARTING_HEARTBEAT_TIMEOUT_S = 60.0
"""For a worker that is not up yet: loading torch's libraries from a cold disk stops all of its threads."""

START_TIMEOUT_S = 120.0
"""From the start of the processes to their first word; loading what they held comes after that."""

MEET_ALONE_TIMEOUT_S = 300.0
"""On one machine, from the start of the processes: a cold disk may take long over torch's libraries."""

MEET_TIMEOUT_S = 60.0
"""Between machines: from a complete membership until the ranks have their process groups."""


@dataclasses.dataclass
class WorkerLine:
    """The connection of one worker, and the last that it said.

    machine: the name of the machine that it came from over the network; "" for a process of this one.
    """

    wire: Wire
    rank: int
    pid: int
    heard_at: float
    machine: str = ""
    has_met: bool = False
    has_tried: bool = False
    step: trial.Step | None = None
    """Of the first exchange between the ranks, the last that it began."""
    is_up: bool = False
    status: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    prepared: int = 0
    joined: int = 0
    join_failed: int = 0
    running: str | None = None
    done: tuple[int, int] = (0, 0)
    """Generation and serial number of the last message that it ended."""

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            self.wire.send(message, fds)
        except ConnectionError:
            # Its socket reports the end to the coordinator, which then acts on it.
            return


class Membership:
    """The workers of one attempt: none, some or all of `devices` are connected.

    network: that they come over, all at once (see `Rendezvous`); None for the elastic agent's own, who come one by one.
    """

    def __init__(self, devices: list[str], network: Network | None = None) -> None:
        self.devices = devices
        self.network = network
        self.attempt = -1
        self.workers: dict[int, WorkerLine] = {}
        self.started_at = self._met_at = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Every rank has its process groups, its service and what was resident before."""
        return len(self.workers) == len(self.devices) and all(w.is_up for w in self.workers.values())

    def admit(self, wire: Wire, hello: dict[str, Any]) -> WorkerLine | None:
        """The new worker's line; None when it belongs to an attempt that is over. Raises Malformed."""
        rank, attempt = integer(hello, "rank", high=len(self.devices) - 1), integer(hello, "attempt")
        pid, _ = wire.peer()
        if attempt < self.attempt or (attempt == self.attempt and rank in self.workers):
            return None
        if attempt > self.attempt:
            self.attempt, self.workers = attempt, {}
        self.workers[rank] = WorkerLine(wire=wire, rank=rank, pid=pid, heard_at=time.monotonic())
        return self.workers[rank]

    def begin(self, workers: dict[int, WorkerLine]) -> None:
        """A new attempt with all of its workers."""
        assert len(workers) == len(self.devices)
        self.attempt, self.workers = self.attempt + 1, workers
        self.started_at = time.monotonic()

    def broadcast(self, message: dict[str, Any]) -> None:
        for worker in list(self.workers.values()):
            worker.send(message)

    def label(self, worker: WorkerLine) -> str:
        where = f" on {worker.machine}" if worker.machine else ""
        return f"worker {worker.rank} (pid {worker.pid}{where}, {self.devices[worker.rank]})"

    def hung(self) -> str | None:
        """A sentence about a worker that stopped talking, if there is one."""
        now = time.monotonic()
        for worker in self.workers.values():
            limit_s = HEARTBEAT_TIMEOUT_S if worker.is_up else STARTING_HEARTBEAT_TIMEOUT_S
            if now - worker.heard_at > limit_s:
                return f"{self.label(worker)} gave no sign of life for {limit_s:.0f} s"
        if self.network is not None:
            return self._apart(self.network, now)
        if len(self.workers) < len(self.devices) and now - self.started_at > START_TIMEOUT_S:
            return f"{len(self.devices) - len(self.workers)} workers did not start in {START_TIMEOUT_S:.0f} s"
        apart = [self.label(worker) for worker in self.workers.values() if not worker.has_met]
        if apart and now - self.started_at > MEET_ALONE_TIMEOUT_S:
            return f"{' and '.join(apart)} did not meet the other ranks in {MEET_ALONE_TIMEOUT_S:.0f} s"
        return None

    def _apart(self, network: Network, now: float) -> str | None:
        """A sentence when the machines can't reach each other, though all of them reach the coordinator."""
        if now - self.started_at < MEET_TIMEOUT_S or all(worker.has_met for worker in self.workers.values()):
            return None
        return (
            f"the workers did not reach each other over {network.interface} within {MEET_TIMEOUT_S:.0f} s; let the "
            "machines' firewalls pass every TCP port between them"
        )

    def untried(self) -> str | None:
        """A sentence when the ranks' first exchange takes too long."""
        now, workers = time.monotonic(), self.workers.values()
        if len(workers) < len(self.devices) or not all(worker.has_met for worker in workers):
            self._met_at = now
        late = {worker.rank: worker.step for worker in workers if not worker.has_tried}
        if not late or now - self._met_at <= trial.LIMIT_S:
            return None
        return trial.overdue(dict(sorted(late.items())), self.devices)

    def kill(self) -> None:
        """End every connected worker at once, also one that is stopped or stuck in a collective.

        Safe against reuse of a pid: one whose connection is open is alive. Those of other machines end
        when the coordinator closes their connection.
        """
        for worker in self.workers.values():
            if worker.machine:
                continue
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
                entry["environment"] = worker.environment
                if worker.machine:
                    entry["machine"] = worker.machine
            ranks.append(entry)
        return ranks


def failure_of(message: dict[str, Any], num_ranks: int) -> dict[str, Any] | None:
    """The fields of the `Failure` with which a worker says that it ended a message; None for a result."""
    if message.get("failure") is None:
        return None
    found = table(message, "failure")
    return {
        "rank": integer(found, "rank", high=num_ranks - 1),
        "kind": one_of(found, "kind", SAID_FIRST),
        "message": text(found, "message"),
        "trace": text(found, "trace"),
        # What isn't said is the worse.
        "has_communicated": found.get("has_communicated") is not False,
    }
