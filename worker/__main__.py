"""A worker's entry point, started by the pool's elastic agent: one process per device."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from comfy_xdit.pool.devices import num_cores
from comfy_xdit.pool.wire import Wire

from .link import Link, memory

PR_SET_PDEATHSIG = 1
GROUP_TIMEOUT_S = 1800
"""torch's own last resort for a collective; the door finds a stuck rank long before."""


def main() -> None:
    """Greet the door, then become a rank; never returns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--door", type=Path, required=True)
    parser.add_argument("--service", required=True, help="module:Class")
    parser.add_argument("--path", action="append", default=[], help="folder for sys.path")
    args = parser.parse_args()
    _die_with_parent()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    sys.path[:0] = args.path
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wire = Wire.connect(args.door)
    wire.send({"type": "worker", "rank": rank, "attempt": int(os.environ["TORCHELASTIC_RESTART_COUNT"])})
    welcome = _welcome(wire)
    link = Link(wire)
    link.start()
    # Imports torch, which takes a while: the door already knows this process, hears it and can end it.
    from .loop import guard

    guard(lambda: _serve(link, welcome, args.service, rank, world_size), link)


def _welcome(wire: Wire) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if messages := wire.wait(1.0):
            return messages[0]
    raise SystemExit("the pool's door did not answer")


def _die_with_parent() -> None:
    """A SIGKILL from the kernel when the supervisor ends in any way."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have ended before the call; then the kernel will not tell.
    if os.getppid() != parent or parent == 1:
        os._exit(1)


def _serve(link: Link, welcome: dict[str, Any], service: str, rank: int, world_size: int) -> None:
    import torch

    from .loop import Loop

    name = welcome["devices"][rank]
    device = torch.device(name)
    _claim(device, welcome["devices"])
    link.measure = lambda: memory(name)
    _join_ranks(device, welcome["store"], rank, world_size)
    module, _, cls = service.partition(":")
    made = getattr(importlib.import_module(module), cls)(rank=rank, world_size=world_size, device=device)
    loop = Loop(pool=welcome["pool"], rank=rank, world_size=world_size, service=made, link=link)
    loop.reload(welcome["residents"])
    link.on_order = loop.order
    link.measure = lambda: {**memory(name), **loop.snapshot}
    link.say("up")
    loop.run()


def _claim(device: Any, devices: list[str]) -> None:
    """Take this rank's share of the machine."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // len(devices)))


def _join_ranks(device: Any, store: str, rank: int, world_size: int) -> None:
    """Make the default process group of all ranks. Collective."""
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )


if __name__ == "__main__":
    main()
