"""Links between devices, and devices: what is known of them by name, for a plan without the machine at hand."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from comfy_xdit.parallel.spec import AXES, ParallelSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank sends through at a time.

    bytes_per_s: that a collective reaches in each direction, not the number on the box; rates: by collective,
    where it is known. latency_s: of one collective or send, with the launch of its kernel.
    """

    name: str
    bytes_per_s: float
    latency_s: float
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def on(self, spec: ParallelSpec, *axes: str) -> Link:
        """Itself: every axis of a spec goes over it."""
        return self

    def seconds(self, sent: Mapping[str, float], num_messages: int = 1) -> float:
        """For so many bytes by collective, in so many messages; 0 when there is nothing to send."""
        if not any(sent.values()):
            return 0.0
        latency = num_messages * self.latency_s
        return latency + sum(count / self.rates.get(name, self.bytes_per_s) for name, count in sent.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """The links of ranks on several machines, `num_local` on each, numbered machine after machine.

    within: between ranks of a machine; across: what each rank reaches when all of them send to other machines at once.
    """

    name: str
    within: Link
    across: Link
    num_local: int

    @property
    def bytes_per_s(self) -> float:
        return self.across.bytes_per_s

    def on(self, spec: ParallelSpec, *axes: str) -> Link:
        """What the collectives of `axes`, or of all of them joined, go over: `across` where a line leaves a machine."""
        spans = [self._span(spec, axis) for axis in axes if getattr(spec, axis) > 1]
        return self.within if all(self.num_local % span == 0 for span in spans) else self.across

    def _span(self, spec: ParallelSpec, axis: str) -> int:
        """How many ranks, one after the other, a line of the axis lies in."""
        inner = AXES[AXES.index(axis) :]
        return math.prod(getattr(spec, each) for each in inner)


Links = Link | Machines

RESERVED_SHARE, RESERVED_BYTES = 0.1, 2e9
"""Of a device's memory, the larger of the two is left free: for the contexts of CUDA and NCCL in each process, gaps
between the allocator's blocks, and ComfyUI's own process with a small text encoder and a VAE. On a CPU, the system."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """flops_per_s: of a transformer's large matrices in its compute dtype; memory_bytes: of one rank, used or not."""

    name: str
    flops_per_s: float
    memory_bytes: float

    @property
    def room_bytes(self) -> float:
        """What a model may take: the rest is for what no formula counts (see `RESERVED_SHARE`)."""
        return max(0.0, self.memory_bytes - max(RESERVED_SHARE * self.memory_bytes, RESERVED_BYTES))


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link(name="nvlink", bytes_per_s=350e9, latency_s=12e-6),
        Link(name="pcie5", bytes_per_s=40e9, latency_s=15e-6),
        Link(name="pcie4", bytes_per_s=20e9, latency_s=15e-6),
        Link(name="pcie3", bytes_per_s=10e9, latency_s=20e-6),
    )
}
"""About 80 % of NVLink 4's 450 GB/s each way, and 65 % of a PCIe slot of 16 lanes."""

ETHERNET_SHARE, ETHERNET_LATENCY_S = 0.92, 50e-6
"""Of an Ethernet's bit rate, what is left of headers and acknowledgements; and of a message through the kernel."""

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(name="h200", flops_per_s=0.55 * 989e12, memory_bytes=141e9),
        Device(name="h100", flops_per_s=0.55 * 989e12, memory_bytes=80e9),
        Device(name="a100", flops_per_s=0.65 * 312e12, memory_bytes=80e9),
        Device(name="l40s", flops_per_s=0.55 * 362e12, memory_bytes=48e9),
        Device(name="rtx4090", flops_per_s=0.8 * 165e12, memory_bytes=24e9),
        Device(name="rtx3090", flops_per_s=0.8 * 71e12, memory_bytes=24e9),
        Device(name="cpu-core", flops_per_s=50e9, memory_bytes=16e9),
    )
}
"""Peak rate of dense bf16 matrices (fp32 for the core), times the share that large transformers reach."""


def link_named(name: str) -> Link:
    """A link by name: one of `LINKS`, or "ethernet-" and its Gbit/s ("ethernet-25", "ethernet-0.5").

    Raises ValueError for other names.
    """
    ethernet = re.fullmatch(r"ethernet-(\d+(?:\.\d+)?)", name)
    if ethernet and float(ethernet[1]) > 0:
        rate = float(ethernet[1]) * 1e9 / 8 * ETHERNET_SHARE
        return Link(name=name, bytes_per_s=rate, latency_s=ETHERNET_LATENCY_S)
    if name not in LINKS:
        raise ValueError(f"{name!r} is no known link; use {', '.join(LINKS)} or ethernet-25 for 25 Gbit/s")
    return LINKS[name]


def device_named(name: str) -> Device:
    """Raises ValueError for a name that is not in `DEVICES`."""
    if name not in DEVICES:
        raise ValueError(f"{name!r} is no known device; use {', '.join(DEVICES)}")
    return DEVICES[name]
