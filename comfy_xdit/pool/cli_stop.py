"""`comfy-xdit pool stop`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time

from .client import status
from .errors import PoolError
from .folder import pool_folder
from .start import say
from .wire import Wire

STOP_TIMEOUT_S = 15.0
POLL_S = 0.05


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--name", default="default", help="name of the pool (default: default)")


def run(args: argparse.Namespace) -> int:
    """End the pool; returns when none of its processes is left."""
    try:
        num_workers = stop(args.name)
    except ConnectionError:
        sys.stdout.write(f"no pool {args.name!r} runs\n")
        return 0
    workers = f"its {num_workers} workers" if num_workers else "its workers"
    sys.stdout.write(f"pool {args.name!r} and {workers} ended\n")
    return 0


def stop(name: str = "default") -> int:
    """End the pool `name` and wait for all of its processes; how many workers it had.

    Works with a pool of any version. Raises ConnectionError when none runs, PoolError when it does not end.
    """
    folder = pool_folder(name)
    if not folder.door.exists():
        raise ConnectionError(f"no pool {name!r} runs")
    pids: list[int] = []
    num_workers = 0
    supervisor = _listener(name)
    try:
        found = status(name)
        workers = [rank["pid"] for rank in found["ranks"] if rank["pid"]]
    except (PoolError, KeyError):
        # It hangs, speaks otherwise, or has gone meanwhile. Its workers end with it (PDEATHSIG).
        if supervisor:
            pids = [supervisor]
            _kill(supervisor)
    else:
        supervisor = int(found["pid"])
        _ask_to_stop(name, supervisor)
        # The supervisor waits for workers on other machines itself, and pids there say nothing here.
        pids = [*([] if found.get("network") else workers), supervisor]
        num_workers = len(workers)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        with folder.try_lock("alive") as free:
            if free and not any(map(is_running, pids)):
                folder.clear()
                if not pids:
                    raise ConnectionError(f"no pool {name!r} runs")
                return num_workers
        time.sleep(POLL_S)
    raise PoolError(f"pool {name!r} did not end in {STOP_TIMEOUT_S:.0f} s; see {folder.log}")


def _ask_to_stop(name: str, supervisor: int) -> None:
    try:
        wire, _ = say(pool_folder(name), {"type": "stop"})
        wire.close()
    except (ConnectionError, PoolError):
        # It is ending already, or hangs.
        _kill(supervisor)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _listener(name: str) -> int:
    """The process that listens at the pool's door; 0 when none does."""
    try:
        wire = Wire.connect(pool_folder(name).door)
    except OSError:
        return 0
    # unix(7): of who called listen(2), whether it answers or not.
    pid, _ = wire.peer()
    wire.close()
    return pid


def is_running(pid: int) -> bool:
    """Whether `pid` is a process that has not ended; one that awaits its parent (a zombie) has."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
