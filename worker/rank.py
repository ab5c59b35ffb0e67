"""From a process that was welcomed at the coordinator to a rank of the pool."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from comfy_xdit.pool.devices import num_cores
from comfy_xdit.pool.environment import told
from comfy_xdit.pool.wire import Wire

from .coordinator_client import CoordinatorClient, device_memory, host_memory

if TYPE_CHECKING:
    import torch

PR_SET_PDEATHSIG = 1


def prepare(path: list[str]) -> None:
    """End with the parent, log to standard error, find modules in the folders `path`."""
    _die_with_parent()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    sys.path[:0] = path


def _die_with_parent() -> None:
    """A SIGKILL from the kernel when the supervisor, or torchrun, ends in any way."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have ended before the call; then the kernel will not tell.
    if os.getppid() != parent or (parent == 1 and not _is_our_python(1)):
        os._exit(1)


def _is_our_python(pid: int) -> bool:
    """Whether `pid` runs this interpreter: in a container torchrun may be the first process, which adopts orphans
    elsewhere."""
    try:
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except OSError:
        return False


def become(wire: Wire, welcome: dict[str, Any], *, service: str, interface: str, num_local: int) -> None:
    """Be the rank that `welcome` says, for a service "module:Class"; never returns.

    num_local: ranks that share this machine.
    """
    coordinator = CoordinatorClient(wire)
    coordinator.start()
    # Imports torch, which takes a while: the coordinator already knows this process, hears it and can end it.
    from .loop import guard

    guard(lambda: _serve(coordinator, welcome, service, interface, num_local), coordinator)


def _serve(
    coordinator: CoordinatorClient, welcome: dict[str, Any], service: str, interface: str, num_local: int
) -> None:
    import torch

    from .loop import Loop
    from .trial import try_groups

    rank, world_size = welcome["rank"], len(welcome["devices"])
    name = welcome["devices"][rank]
    device = torch.device(name)
    _claim(device, num_local)
    coordinator.measure = host_memory
    _join_ranks(device, welcome["store"], rank, world_size)
    coordinator.say("met")
    try_groups(device, rank, world_size, coordinator.say)
    module, _, cls = service.partition(":")
    made = getattr(importlib.import_module(module), cls)(rank=rank, world_size=world_size, device=device)
    loop = Loop(
        pool=welcome["pool"],
        rank=rank,
        world_size=world_size,
        service=made,
        coordinator=coordinator,
        interface=interface,
        device_memory=lambda: device_memory(name),
    )
    loop.reload(welcome["residents"])
    coordinator.on_order = loop.order
    coordinator.measure = lambda: {**host_memory(), **loop.snapshot}
    coordinator.say("up", environment=told(os.environ))
    loop.run()


def _claim(device: torch.device, num_local: int) -> None:
    """Take this rank's share of the machine."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // num_local))


def _join_ranks(device: torch.device, store: str, rank: int, world_size: int) -> None:
    """Make the default process group of all ranks. Collective."""
    from datetime import timedelta

    import torch.distributed as dist

    from comfy_xdit.parallel.groups import GROUP_TIMEOUT_S
    from comfy_xdit.pool.stores import open_store

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=open_store(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
