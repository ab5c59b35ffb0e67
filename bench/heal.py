"""`comfy-xdit bench heal`: kill a worker again and again; what each time cost, and whether anything grows.

Needs no model: the job is a `Status` message, sent without pause, so that the kill meets a call in flight
or falls between two.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import statistics
import sys
import threading
import time
from typing import Any

from comfy_xdit.messages import Message, Status
from comfy_xdit.pool.client import Pool, PoolError
from comfy_xdit.pool.stop import is_running

LONGEST_DELAY_S = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycle:
    """One kill. failed_s: from the kill to the error; healed_s: from the kill to the next result.

    supervisor_bytes, client_bytes, worker_bytes: private memory after it (of the workers, the mean).
    """

    failed_s: float
    healed_s: float
    supervisor_bytes: int
    client_bytes: int
    worker_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All cycles, and the killed attempts' processes that are still there (there should be none)."""

    cycles: list[Cycle]
    orphans: list[int]


def heal(pool: Pool, cycles: int, *, job: Message | None = None) -> Report:
    """Kill one rank after another, `cycles` times, each while `job` is being run.

    job: None is `Status`. Raises PoolError when a cycle does not heal.
    """
    job = Status() if job is None else job
    done: list[Cycle] = []
    used: set[int] = set()
    with pool.lease():
        pool.call(job)
        for index in range(cycles):
            pids = [rank["pid"] for rank in pool.status()["ranks"]]
            used.update(pids)
            delay_s = LONGEST_DELAY_S * (index % 4) / 3
            failed_s, healed_s = _kill_and_heal(pool, pids[index % len(pids)], job, delay_s)
            done.append(_measure(pool, failed_s, healed_s))
    now = {rank["pid"] for rank in pool.status()["ranks"]}
    return Report(cycles=done, orphans=[pid for pid in used - now if is_running(pid)])


def _kill_and_heal(pool: Pool, pid: int, job: Message, delay_s: float) -> tuple[float, float]:
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(delay_s, kill)
    timer.start()
    try:
        while True:
            pool.call(job)
    except PoolError as error:
        if error.kind != "lost":
            raise
        failed_at = time.monotonic()
    finally:
        timer.join()
    pool.call(job)
    return failed_at - killed_at[0], time.monotonic() - killed_at[0]


def _measure(pool: Pool, failed_s: float, healed_s: float) -> Cycle:
    found = pool.status()
    workers = [private_bytes(rank["pid"]) for rank in found["ranks"] if rank["pid"]]
    return Cycle(
        failed_s=failed_s,
        healed_s=healed_s,
        supervisor_bytes=private_bytes(found["pid"]),
        client_bytes=private_bytes(os.getpid()),
        worker_bytes=int(statistics.mean(workers)),
    )


def private_bytes(pid: int) -> int:
    """Bytes of RAM that only `pid` uses (resident minus shared)."""
    with open(f"/proc/{pid}/statm") as statm:
        _, resident, shared, *_ = (int(pages) for pages in statm.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--cycles", type=int, default=50, help="how many kills (default: 50)")
    parser.add_argument("--devices", default="auto", help="as of pool start (default: auto)")
    parser.add_argument("--name", default="bench-heal", help="name of the pool (default: bench-heal)")


def run(args: argparse.Namespace) -> int:
    """Print the report; status 1 when a process was left behind."""
    from comfy_xdit.pool.stop import stop

    pool = Pool.connect(args.name, args.devices)
    try:
        report = heal(pool, args.cycles)
    finally:
        pool.close()
        stop(args.name)
    sys.stdout.write(render(report))
    return 1 if report.orphans else 0


def render(report: Report) -> str:
    """The report as a few lines."""

    def row(label: str, values: list[float], unit: str) -> str:
        return f"{label:<34}{statistics.median(values):8.2f} median {max(values):8.2f} max {unit}\n"

    def growth(label: str, values: list[Any]) -> str:
        first, last = values[0] / 2**20, values[-1] / 2**20
        return f"{label:<34}{first:8.1f} first  {last:8.1f} last MiB\n"

    cycles = report.cycles
    return (
        f"{len(cycles)} workers killed and healed; {len(report.orphans)} processes left behind\n"
        + row("from the kill to the error", [cycle.failed_s for cycle in cycles], "s")
        + row("from the kill to the next result", [cycle.healed_s for cycle in cycles], "s")
        + growth("private memory of the supervisor", [cycle.supervisor_bytes for cycle in cycles])
        + growth("private memory of the client", [cycle.client_bytes for cycle in cycles])
        + growth("private memory of a worker", [cycle.worker_bytes for cycle in cycles])
    )
