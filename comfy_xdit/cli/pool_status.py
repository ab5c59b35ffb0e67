"""`comfy-xdit pool status`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from comfy_xdit.pool.client import status
from comfy_xdit.pool.devices import describe
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.network import Network
from comfy_xdit.pool.silence import TELL_AFTER_S


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--name", default="default", help="name of the pool (default: default)")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show the pool. Raises PoolError when it does not run: with the log that it left, which may say why."""
    try:
        found = status(args.name)
    except PoolError as error:
        log = pool_folder(args.name).log
        raise PoolError(f"{error}; log: {log}" if log.exists() else str(error), kind=error.kind) from None
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else render(found))
    return 0


def render(found: dict[str, Any]) -> str:
    """The status as a few lines and a table with one line per rank."""
    client = found["client"]
    network = Network(**found["network"]) if found["network"] else None
    lines = [
        f"pool {found['name']!r} is {found['state']}, on {describe(found['devices'], network)}, "
        f"for {_duration(found['uptime_s'])}; {found['num_restarts']} restarts",
        f"generation {found['generation']}, client "
        + ("none" if client is None else f"pid {client['pid']}{_lease(client)}")
        + f", {len(found['queue'])} waiting",
        f"log: {found['log']}",
    ]
    if found["last_error"]:
        lines.append(f"last error: {found['last_error']}")
    if found["missing"]:
        lines.append(found["missing"])
    lines += _environment(found)
    lines += [_rank_line(rank) for rank in found["ranks"]]
    return "\n".join(lines) + "\n"


def _lease(client: dict[str, Any]) -> str:
    if not client["is_leased"]:
        return ""
    text = f"in a lease for {_duration(client['lease_s'])}"
    if client["silent_s"] > TELL_AFTER_S:
        text += f", no sign of life for {_duration(client['silent_s'])}"
    return f" ({text}{', stopped' if client['is_stopped'] else ''})"


def _environment(found: dict[str, Any]) -> list[str]:
    """What the workers run with, a line for all of them or, where they differ, for each; and what they run without."""
    known = {rank["rank"]: rank["environment"] for rank in found["ranks"] if rank.get("environment")}
    values = [", ".join(f"{name}={value}" for name, value in sorted(own.items())) for own in known.values()]
    if len(set(values)) == 1:
        lines = [f"environment: {values[0]}"]
    else:
        lines = [f"environment of rank {rank}: {value}" for rank, value in zip(known, values, strict=True)]
    changes = found["environment"]
    if without := [f"{name}={value}" for part in ("replaced", "dropped") for name, value in changes[part].items()]:
        lines.append(f"left out of it: {', '.join(without)}")
    return lines + [found["hidden"]] * bool(found["hidden"])


def _rank_line(rank: dict[str, Any]) -> str:
    memory = f"{rank.get('ram_private_bytes', 0) / 2**20:.0f} MiB RAM"
    if "device_bytes" in rank:
        held, total = rank["device_bytes"] / 2**30, rank["device_total_bytes"] / 2**30
        memory += f", {held:.1f} of {total:.0f} GiB on the device"
    resident = [_model(model) for model in rank.get("models") or ()]
    resident += [f"VAE {_file(key)}" for key in rank.get("vaes") or ()]
    machine = f"{rank['machine']:<16}" if "machine" in rank else ""
    return (
        f"  rank {rank['rank']}  {machine}{rank['device']:<8} pid {rank['pid'] or '-':<8} {rank['state']:<9}"
        f"{memory}  {', '.join(resident) or 'nothing resident'}"
    )


def _model(model: Any) -> str:
    """A resident model in a few words; services other than ours may list plain names."""
    if not isinstance(model, dict):
        return str(model)
    first, end = model.get("blocks", (0, 0))
    size = sum(model["bytes"].values()) / 2**20
    whose = ", ComfyUI's class" if model.get("source") == "ComfyUI" else ""
    text = f"{model['family']} {_file(model['model'])}{whose}: blocks {first} to {end - 1}, {size:.0f} MiB"
    return f"{text}, LoRA on {model['patches']} weights" if model["patches"] else text


def _file(key: str) -> str:
    """The file's name in a key that a client made of its path and more."""
    return Path(str(key).partition("|")[0]).name


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
