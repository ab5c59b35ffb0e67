"""End a pool from outside, whatever state it is in."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from .errors import PoolError
from .folder import PoolFolder, pool_folder
from .locks import holders
from .start import say

STOP_TIMEOUT_S = 15.0
RETURN_LIMIT_S = 3.0
POLL_S = 0.05


def stop(name: str = "default") -> int:
    """End the pool `name` and wait for all of its processes; how many workers it had.

    Works with a pool of any version, and with one whose folder or socket somebody deleted.
    Raises ConnectionError when none runs, PoolError when it does not end.
    """
    folder = pool_folder(name)
    pids: list[int] = []
    num_workers = 0
    found = _status(folder)
    if found is None:
        # It hangs, speaks otherwise, or is gone. Its workers end with it (PDEATHSIG).
        pids = _supervisors(folder)
        for pid in pids:
            _kill(pid)
    else:
        workers = [rank["pid"] for rank in found["ranks"] if rank["pid"]]
        supervisor = int(found["pid"])
        _ask_to_stop(folder, supervisor)
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


def _status(folder: PoolFolder) -> dict[str, Any] | None:
    """What the pool says of itself; None when it doesn't, in no way that we know."""
    deadline = time.monotonic() + RETURN_LIMIT_S
    while True:
        try:
            wire, found = say(folder, {"type": "status"})
        except ConnectionError:
            # One whose folder was deleted is soon back at its place.
            if time.monotonic() > deadline or not _supervisors(folder):
                return None
            time.sleep(POLL_S)
        except PoolError:
            return None
        else:
            wire.close()
            return found if {"pid", "ranks"} <= found.keys() else None


def _supervisors(folder: PoolFolder) -> list[int]:
    return holders(folder.lock("alive").path)


def _ask_to_stop(folder: PoolFolder, supervisor: int) -> None:
    try:
        wire, _ = say(folder, {"type": "stop"})
        wire.close()
    except (ConnectionError, PoolError):
        # It is ending already, or hangs.
        _kill(supervisor)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether `pid` is a process that has not ended; one that awaits its parent (a zombie) has."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
