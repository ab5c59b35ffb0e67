"""What a pool says of itself."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

from .environment import hidden
from .silence import describe
from .wire import versions

if TYPE_CHECKING:
    from .coordinator import Coordinator


def about(coordinator: Coordinator) -> dict[str, Any]:
    """What a client must know before it can use the pool."""
    return {
        "name": coordinator.folder.name,
        "versions": versions(),
        "pid": os.getpid(),
        "devices": coordinator.membership.devices,
        "network": coordinator.network.fields if coordinator.network else None,
        "transport": coordinator.transport,
        "log": str(coordinator.folder.log),
    }


def report(coordinator: Coordinator) -> dict[str, Any]:
    """What `pool status --json` shows."""
    if coordinator.membership.is_ready:
        state = "busy" if coordinator.grants.leases.is_leased else "ready"
    else:
        state = "failing" if coordinator.starts.is_failing else "starting"
    return {
        "type": "status",
        **about(coordinator),
        "state": state,
        "uptime_s": round(time.monotonic() - coordinator.started_at, 1),
        "num_restarts": coordinator.num_restarts,
        "last_error": coordinator.starts.last_error,
        "missing": coordinator.missing,
        "residents": coordinator.residents,
        "environment": dataclasses.asdict(coordinator.changes),
        "hidden": hidden(os.environ),
        **describe(coordinator.grants.leases),
        "ranks": coordinator.membership.describe(),
    }
