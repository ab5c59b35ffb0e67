"""From what the user typed ("auto", "cuda:0,1", "cpu:2") to one device for each rank."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .network import Network

MAX_AUTO_CPU_RANKS = 4
MAX_CPU_RANKS = 64

FORMS = "use auto, cuda, cuda:0,1 or cpu:2"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_cuda_devices() -> int:
    """CUDA devices that torch sees; asks the driver without making a CUDA context."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def parse_devices(text: str, *, num_cuda: int | None = None, cores: int | None = None) -> list[str]:
    """One device name per rank: ["cuda:0", "cuda:1"], or ["cpu", "cpu"] for "cpu:2".

    "auto" takes all CUDA devices, else one process per core, at most 4.
    num_cuda, cores: what the machine has; None asks it.
    Raises ValueError, naming the device, the limit and the way out.
    """
    kind, _, rest = text.strip().lower().partition(":")
    if kind == "cpu":
        return ["cpu"] * _cpu_ranks(text, rest)
    if kind not in ("auto", "cuda") or (kind == "auto" and rest):
        raise ValueError(f"devices={text!r} names no device that a pool can use; {FORMS}")
    num_cuda = num_cuda_devices() if num_cuda is None else num_cuda
    if kind == "auto" and not num_cuda:
        return ["cpu"] * min(num_cores() if cores is None else cores, MAX_AUTO_CPU_RANKS)
    if not num_cuda:
        raise ValueError(f"devices={text!r}: torch finds no CUDA device on this machine; use auto or cpu:2")
    return [f"cuda:{index}" for index in _cuda_indices(text, rest, num_cuda)]


def _cpu_ranks(text: str, rest: str) -> int:
    count = int(rest or "1") if (rest or "1").isdecimal() else -1
    if not 1 <= count <= MAX_CPU_RANKS:
        raise ValueError(
            f"devices={text!r}: after cpu: comes a number of processes, 1 to {MAX_CPU_RANKS}; use e.g. cpu:2"
        )
    return count


def _cuda_indices(text: str, rest: str, num_cuda: int) -> list[int]:
    if not rest:
        return list(range(num_cuda))
    indices = []
    for part in rest.split(","):
        part = part.strip().removeprefix("cuda:")
        if not part.isdecimal():
            raise ValueError(f"devices={text!r}: {part!r} is no device index; {FORMS}")
        index = int(part)
        if index >= num_cuda:
            have = "only cuda:0" if num_cuda == 1 else f"cuda:0 to cuda:{num_cuda - 1}"
            raise ValueError(f"devices={text!r}: there is no cuda:{index} on this machine; it has {have}")
        if index in indices:
            raise ValueError(f"devices={text!r} names cuda:{index} twice; give each device once")
        indices.append(index)
    return indices


def describe(devices: list[str], network: Network | None = None) -> str:
    """The text that `parse_devices` turns into `devices`; for several machines, that of each and how many."""
    if network is not None:
        own = devices[: len(devices) // network.num_machines]
        place = f"{network.coordinator} ({network.interface})"
        return f"{describe(own)} of each of {network.num_machines} machines at {place}"
    if all(device == "cpu" for device in devices):
        return f"cpu:{len(devices)}"
    return "cuda:" + ",".join(device.removeprefix("cuda:") for device in devices)
