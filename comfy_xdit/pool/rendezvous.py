"""Workers that came over the network and wait until all are there: only then does an attempt begin.

Each machine's torchrun restarts its own processes when it sees fit, so nobody else knows which of them belong
together. A process greets once, waits here, and is told a store with the others: so no two attempts ever meet in one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from .fields import integer, table, text
from .membership import HEARTBEAT_TIMEOUT_S, WorkerLine
from .network import Network
from .wire import Wire, spell, versions

log = logging.getLogger("comfy_xdit")

MAX_NAME_CHARS = 64

MOST_NAMED = 1 << 16
"""Of machines and processes, in what a worker says of itself."""

END = {"type": "end"}
"""To a worker: end, and have its torchrun end too."""


class Refused(Exception):
    """Why a worker can't come in, in one sentence. again: it may try later."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class Rendezvous:
    """The workers that wait, and what is known of their machines.

    devices: one for each rank, the same on every machine.
    """

    def __init__(self, pool: str, devices: list[str], network: Network) -> None:
        self._pool, self._network = pool, network
        self._num_devices = len(devices) // network.num_machines
        self._num_ranks = len(devices)
        self._names: dict[int, str] = {}
        self._is_over = False
        self.waiting: dict[int, WorkerLine] = {}

    def greet(self, wire: Wire, hello: Mapping[str, Any], present: Mapping[int, WorkerLine]) -> WorkerLine | None:
        """The line of a newcomer, who waits from now on; None for one who was told why not.

        present: the workers of the attempt that runs. Raises ConnectionError, and Malformed for greetings of no sense.
        """
        if hello.get("type") != "worker":
            return None
        if self._is_over:
            wire.send(END)
            return None
        try:
            return self._admit(wire, hello, present)
        except Refused as refusal:
            log.warning("a worker was refused: %s", refusal)
            wire.send({"type": "refused", "reason": str(refusal), "again": refusal.again})
            return None

    def _admit(self, wire: Wire, hello: Mapping[str, Any], present: Mapping[int, WorkerLine]) -> WorkerLine:
        # Of any sign, so that a wrong one is told, not dropped.
        machine, local = (integer(hello, name, low=-MOST_NAMED, high=MOST_NAMED) for name in ("machine", "local_rank"))
        pid = integer(hello, "pid", low=1)
        name = "".join(filter(str.isprintable, text(hello, "host")))[:MAX_NAME_CHARS]
        self._check(hello, machine, local, name)
        rank = machine * self._num_devices + local
        holder = present.get(rank) or self.waiting.get(rank)
        if holder is not None:
            raise Refused(
                f"rank {rank} of this pool is process {holder.pid} on {holder.machine}; give each machine a "
                f"--node-rank of its own, 0 to {self._network.num_machines - 1}",
                # It may have died with its machine, and not be missed yet.
                again=True,
            )
        self._names[machine] = name
        line = WorkerLine(wire=wire, rank=rank, pid=pid, heard_at=time.monotonic(), machine=name)
        self.waiting[rank] = line
        return line

    def _check(self, hello: Mapping[str, Any], machine: int, local: int, name: str) -> None:
        theirs, mine = table(hello, "versions"), versions()
        num_local = integer(hello, "num_local", high=MOST_NAMED)
        if theirs != mine:
            raise Refused(
                f"{name} has {spell(theirs)}, and the pool {spell(mine)}; install the same on every machine"
            )
        if not 0 <= machine < self._network.num_machines:
            raise Refused(
                f"--node-rank {machine} is none of this pool's {self._network.num_machines} machines; "
                f"use 0 to {self._network.num_machines - 1}"
            )
        if num_local != self._num_devices or not 0 <= local < self._num_devices:
            raise Refused(
                f"torchrun starts {num_local} processes on {name}, and the pool has {self._num_devices} "
                f"devices on each machine; use --nproc-per-node {self._num_devices}"
            )

    def leave(self, line: WorkerLine) -> None:
        """One that waited is gone."""
        if self.waiting.get(line.rank) is line:
            del self.waiting[line.rank]

    def dismiss(self, present: Mapping[int, WorkerLine]) -> None:
        """Tell all of them, those that come later too, that this is the end. Any thread may call."""
        self._is_over = True
        for worker in [*present.values(), *self.waiting.values()]:
            worker.send(END)

    def silent(self) -> list[WorkerLine]:
        """Those that gave no sign of life for too long."""
        limit = time.monotonic() - HEARTBEAT_TIMEOUT_S
        return [line for line in self.waiting.values() if line.heard_at < limit]

    def take(self) -> dict[int, WorkerLine] | None:
        """All workers, once all are there."""
        if len(self.waiting) < self._num_ranks:
            return None
        taken, self.waiting = self.waiting, {}
        return taken

    def missing(self) -> str:
        """Who isn't there, in one sentence with the way out; "" when all are."""
        found = []
        for machine in range(self._network.num_machines):
            ranks = range(machine * self._num_devices, (machine + 1) * self._num_devices)
            absent = [str(rank) for rank in ranks if rank not in self.waiting]
            if absent:
                seen = f", last seen as {self._names[machine]}" if machine in self._names else ""
                found.append(f"rank{'s' if len(absent) > 1 else ''} {', '.join(absent)} (machine {machine}{seen})")
        if not found:
            return ""
        return (
            f"pool {self._pool!r} waits at {self._network.coordinator} for {' and '.join(found)}; "
            f"`comfy-xdit pool start --name {self._pool}` prints what to run on each machine"
        )
