"""`comfy-xdit pool start`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from .client import Pool, status
from .devices import describe
from .errors import PoolError

POLL_S = 0.1


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--devices", default="auto", help="auto, cuda, cuda:0,1 or cpu:2 (default: auto)")
    parser.add_argument("--name", default="default", help="name of the pool (default: default)")
    parser.add_argument(
        "--service", help="module:Class that the workers run instead of their own (for tests)"
    )
    parser.add_argument("--path", action="append", default=[], help="folder for the workers' sys.path")


def run(args: argparse.Namespace) -> int:
    """Start the pool if it does not run, and return when its workers are up."""
    options = {"path": tuple(args.path), **({"service": args.service} if args.service else {})}
    pool = Pool.connect(args.name, args.devices, start=True, **options)
    try:
        started = time.monotonic()
        found = wait_until_up(args.name)
        sys.stdout.write(
            f"pool {args.name!r}: {len(found['ranks'])} workers on {describe(pool.devices)}, "
            f"up after {time.monotonic() - started:.1f} s; log: {found['log']}\n"
        )
        if not args.service:
            measured_now(pool)
    finally:
        pool.close()
    return 0


def measured_now(pool: Pool) -> None:
    """Have the links and devices measured while nobody waits, once for these devices."""
    from comfy_xdit.cost.measured import measure

    link, device = measure(pool)
    links = f"{link.bytes_per_s / 1e9:.3g} GB/s between ranks, " if pool.num_ranks > 1 else ""
    sys.stdout.write(f"measured: {links}{device.flops_per_s / 1e12:.3g} TFLOP/s a rank\n")


def wait_until_up(name: str) -> dict[str, Any]:
    """The status of pool `name`, once all of its workers are up. Raises PoolError when they cannot start."""
    while True:
        found = status(name)
        if found["state"] in ("ready", "busy"):
            return found
        if found["state"] == "failing":
            raise PoolError(
                f"the workers of pool {name!r} fail to start ({found['last_error'] or 'they end at once'}); "
                f"see {found['log']}, and end the pool with `comfy-xdit pool stop --name {name}`"
            )
        time.sleep(POLL_S)
