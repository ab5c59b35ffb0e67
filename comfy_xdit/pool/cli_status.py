"""`comfy-xdit pool status`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .client import status
from .devices import describe


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--name", default="default", help="name of the pool (default: default)")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show the pool; status 1 when it does not run."""
    found = status(args.name)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else render(found))
    return 0


def render(found: dict[str, Any]) -> str:
    """The status as a few lines and a table with one line per rank."""
    client = found["client"]
    lines = [
        f"pool {found['name']!r} is {found['state']}, on {describe(found['devices'])}, "
        f"for {_duration(found['uptime_s'])}; {found['num_restarts']} restarts",
        f"generation {found['generation']}, client "
        + ("none" if client is None else f"pid {client['pid']}{' (in a turn)' if client['in_turn'] else ''}")
        + f", {len(found['queue'])} waiting",
        f"log: {found['log']}",
    ]
    if found["last_error"]:
        lines.append(f"last error: {found['last_error']}")
    lines += [_rank_line(rank) for rank in found["ranks"]]
    return "\n".join(lines) + "\n"


def _rank_line(rank: dict[str, Any]) -> str:
    memory = f"{rank.get('ram_private_bytes', 0) / 2**20:.0f} MiB RAM"
    if "device_bytes" in rank:
        held, total = rank["device_bytes"] / 2**30, rank["device_total_bytes"] / 2**30
        memory += f", {held:.1f} of {total:.0f} GiB on the device"
    resident = [str(item) for key in ("models", "loras", "vaes") for item in _items(rank.get(key))]
    return (
        f"  rank {rank['rank']}  {rank['device']:<8} pid {rank['pid'] or '-':<8} {rank['state']:<9}"
        f"{memory}  {', '.join(resident) or 'nothing resident'}"
    )


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [f"{key}: {item}" if isinstance(item, str) else key for key, item in value.items()]
    return list(value or [])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
