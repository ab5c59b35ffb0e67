"""A pool's links and devices as its ranks measured them once, kept in the pool's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comfy_xdit.messages import Probe
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.folder import pool_folder

from .links import Device, Link, Links, Machines

if TYPE_CHECKING:
    from pathlib import Path

    from comfy_xdit.pool.client import Pool

log = logging.getLogger("comfy_xdit")

LIMIT_S = 120.0


def measure(pool: Pool) -> tuple[Links, Device]:
    """What the pool's ranks measured since it was started; they measure now when they haven't yet, for a second or so.

    Raises PoolError when the pool cannot.
    """
    # In a lease: a pool that has ended is started anew by it, and what was measured of the one before is no use.
    with pool.lease():
        found, key = _read(pool.name), _key(pool)
        if found is None or found["pool"] != key:
            log.info("pool %r measures its links and devices", pool.name)
            value = pool.call(Probe(), timeout_s=LIMIT_S).value
            # Now all machines are there.
            found = {"pool": _key(pool), "measured": value}
            _file(pool.name).write_text(json.dumps(found, indent=2))
    return _as_link(pool.name, found)


def read(name: str) -> tuple[Links, Device]:
    """The last measurement of the pool `name`. Raises ValueError when there is none."""
    found = _read(name)
    if found is None:
        raise ValueError(f"pool {name!r} has not been measured; start it with `comfy-xdit pool start --name {name}`")
    return _as_link(name, found)


def _key(pool: Pool) -> list[Any]:
    """The pool that runs now, and on several machines its processes.

    The ranks' devices won't do: under another CUDA_VISIBLE_DEVICES cuda:0 is another card, perhaps of the same name
    behind another link. A process keeps its cards, and starts its workers on them.
    """
    try:
        coordinator = pool_folder(pool.name).socket.stat()
    except OSError:
        raise PoolError(f"pool {pool.name!r} ended meanwhile; queue the workflow again, which starts it anew") from None
    key: list[Any] = [coordinator.st_ino, coordinator.st_mtime_ns]
    if pool.network is not None:
        key += [[rank.get("machine", ""), rank["device"], rank["pid"]] for rank in pool.status()["ranks"]]
    return key


def _file(name: str) -> Path:
    return pool_folder(name).path / "measured.json"


def _read(name: str) -> dict[str, Any] | None:
    try:
        found = json.loads(_file(name).read_text())
        _as_link(name, found)
    except (OSError, ValueError, KeyError, TypeError):
        # None yet, or of another version.
        return None
    return dict(found)


def _as_link(name: str, found: dict[str, Any]) -> tuple[Links, Device]:
    value = found["measured"]
    device = Device(
        name=" or ".join(dict.fromkeys(value["devices"])),
        flops_per_s=value["flops_per_s"],
        memory_bytes=value["memory_bytes"],
    )
    return links_of(f"the links of pool {name!r}", value), device


def links_of(name: str, probed: Mapping[str, Any]) -> Links:
    """The links that ranks probed (see `probe`)."""
    within = _link(name, probed)
    if "across" not in probed:
        return within
    return Machines(name=name, within=within, across=_link(name, probed["across"]), num_local=probed["num_local"])


def _link(name: str, probed: Mapping[str, Any]) -> Link:
    """One rank alone has the fastest that there could be."""
    rates: dict[str, float] = probed.get("bytes_per_s", {})
    latencies = probed.get("latency_s", {}).values()
    if "send" in rates:
        # A pipeline's messages.
        rates = {**rates, "p2p": rates["send"]}
    return Link(
        name=name,
        bytes_per_s=min(rates.values(), default=1e12),
        latency_s=sum(latencies) / max(len(latencies), 1),
        rates=rates,
    )
