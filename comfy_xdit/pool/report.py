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
    from .door import Door


def about(door: Door) -> dict[str, Any]:
    """What a client must know before it can use the pool."""
    return {
        "name": door.folder.name,
        "versions": versions(),
        "pid": os.getpid(),
        "devices": door.roster.devices,
        "network": door.network.fields if door.network else None,
        "transport": door.transport,
        "log": str(door.folder.log),
    }


def report(door: Door) -> dict[str, Any]:
    """What `pool status --json` shows."""
    if door.roster.is_ready:
        state = "busy" if door.grants.turns.in_turn else "ready"
    else:
        state = "failing" if door.starts.is_failing else "starting"
    return {
        "type": "status",
        **about(door),
        "state": state,
        "uptime_s": round(time.monotonic() - door.started_at, 1),
        "num_restarts": door.num_restarts,
        "last_error": door.starts.last_error,
        "missing": door.missing,
        "residents": door.residents,
        "environment": dataclasses.asdict(door.changes),
        "hidden": hidden(os.environ),
        **describe(door.grants.turns),
        "ranks": door.roster.describe(),
    }
