"""`comfy-xdit pool stop`."""

from __future__ import annotations

import argparse
import sys

from comfy_xdit.pool.stop import stop


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
