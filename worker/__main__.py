"""A worker's entry point, started by the pool's elastic agent on this machine: one process per device."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from comfy_xdit.pool.network import LOOPBACK
from comfy_xdit.pool.wire import Wire

from .rank import become, prepare


def main() -> None:
    """Greet the coordinator, then become a rank; never returns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", type=Path, required=True)
    parser.add_argument("--service", required=True, help="module:Class")
    parser.add_argument("--path", action="append", default=[], help="folder for sys.path")
    args = parser.parse_args()
    prepare(args.path)
    rank, num_local = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    wire = Wire.connect(args.coordinator)
    wire.send({"type": "worker", "rank": rank, "attempt": int(os.environ["TORCHELASTIC_RESTART_COUNT"])})
    become(wire, _welcome(wire), service=args.service, interface=LOOPBACK, num_local=num_local)


def _welcome(wire: Wire) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if messages := wire.wait(1.0):
            return messages[0]
    raise SystemExit("the pool's coordinator did not answer")


if __name__ == "__main__":
    main()
