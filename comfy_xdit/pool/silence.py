"""A client that has the lease and says nothing: stopped (Ctrl-Z, a debugger), or hung. Those who wait are told, and
after a while the lease is taken from it."""

from __future__ import annotations

import time
from typing import Any

from .leases import ClientLine, Leases

TELL_AFTER_S = 10.0
"""A client says every second that it lives, on a thread of its own."""

TAKE_AFTER_S = 120.0
"""A library that keeps Python's lock for so long, and so holds up that thread too, is a program that hangs."""


def silent_s(leases: Leases) -> float:
    """For how long the client that has the lease gave no sign of life; 0 when nobody has the lease."""
    holder = leases.holder
    return time.monotonic() - holder.heard_at if holder is not None and leases.is_leased else 0.0


def is_stopped(pid: int) -> bool:
    """Whether the kernel has stopped the process, for a signal or a debugger (proc(5))."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def who_has_the_lease(leases: Leases) -> str:
    """A sentence for those who wait."""
    holder = leases.holder
    assert holder is not None
    lease_s, quiet_s = time.monotonic() - leases.leased_since, silent_s(leases)
    if quiet_s < TELL_AFTER_S:
        return f"process {holder.pid} has had the pool for {lease_s:.0f} s"
    if is_stopped(holder.pid):
        how, way_out = " and is stopped", f"continue it with `kill -CONT {holder.pid}`, or end it"
    else:
        how, way_out = "", "if it hangs, end it"
    return (
        f"process {holder.pid} has had the pool for {lease_s:.0f} s, gave no sign of life for {quiet_s:.0f} s{how}; "
        f"{way_out}; after {TAKE_AFTER_S:.0f} s the next one is let in"
    )


def why_taken(pool: str, quiet_s: float, following: ClientLine) -> str:
    """A sentence for the one whose lease it was."""
    return (
        f"this process gave no sign of life for {quiet_s:.0f} s while others waited for pool {pool!r}, "
        f"so its lease was given to process {following.pid}"
    )


def describe(leases: Leases) -> dict[str, Any]:
    """What `pool status` shows of the clients."""
    now, holder = time.monotonic(), leases.holder
    client: dict[str, Any] | None = None
    if holder is not None:
        client = {"pid": holder.pid, "is_leased": leases.is_leased}
        if leases.is_leased:
            client["lease_s"] = round(now - leases.leased_since, 1)
            client["silent_s"] = round(silent_s(leases), 1)
            client["is_stopped"] = is_stopped(holder.pid)
    return {
        "generation": leases.generation,
        "phase": leases.phase,
        "client": client,
        "queue": [{"pid": c.pid, "waiting_s": round(now - c.waiting_since, 1)} for c in leases.queue],
    }
