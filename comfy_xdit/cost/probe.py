"""What the links between ranks and the devices reach, measured on the ranks themselves in a second or so.

Over a slow network between machines it takes up to a quarter of a minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit.parallel.context import Axis, ParallelContext
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.sequence import exchange
from comfy_xdit.parallel.spec import ParallelSpec

NUM_REPEATS = 3
"""The best of them counts: whatever else runs can only slow one down."""

SIZES = {"cuda": (64 * 2**20, 8192, torch.bfloat16), "cpu": (4 * 2**20, 768, torch.float32)}
"""Most bytes that a rank sends in one measurement; side of the multiplied matrices, and their dtype."""

FIRST_BYTES, GROWTH, ENOUGH_S = 64 * 2**10, 4, 0.1
"""What is sent first; so many times as much next, until it takes so many seconds."""


def probe(groups: GroupCache, device: torch.device) -> dict[str, Any]:
    """Rates of this rank, the slowest rank's time counting; the same on every rank.

    flops_per_s: of large matrices; memory_bytes: of the device, or of the machine: the least that any rank has.
    devices: what each rank's is called by its maker; "cpu" for all CPUs.
    bytes_per_s: by collective, of what leaves a rank; latency_s: by collective, with next to nothing to send: among the
    ranks of one machine, on all machines at once; both missing where a machine has one rank only.
    across: the same two between machines, each rank with those in its place on the others, all of them at once; where
    there are several machines. num_local: ranks of a machine.
    Collective over all ranks.
    """
    num_bytes, side, dtype = SIZES["cuda" if device.type == "cuda" else "cpu"]
    a = torch.randn(side, side, device=device).to(dtype)
    flops_per_s = 2 * side**3 / _best(lambda: torch.mm(a, a), device, groups)
    found: dict[str, Any] = {"flops_per_s": flops_per_s} | _devices(device, groups)
    found["num_local"] = groups.num_local
    # Of a spec the dp axis is the outermost one and ulysses an inner one: so each has its lines of ranks.
    spec = ParallelSpec(dp=groups.world_size // groups.num_local, ulysses=groups.num_local)
    with ParallelContext(spec, groups) as context:
        if spec.ulysses > 1:
            found |= _links(context.axis("ulysses"), groups, device, num_bytes)
        if spec.dp > 1:
            found["across"] = _links(context.axis("dp"), groups, device, num_bytes)
    return found


def _links(axis: Axis, groups: GroupCache, device: torch.device, most_bytes: int) -> dict[str, dict[str, float]]:
    """latency_s and bytes_per_s by collective."""

    def measured(name: str, num_bytes: int) -> tuple[float, int]:
        run, sent = _collectives(axis, device, num_bytes)[name]
        return _best(run, device, groups), sent

    found: dict[str, dict[str, float]] = {"latency_s": {}, "bytes_per_s": {}}
    for name in _collectives(axis, device, 0):
        latency_s, _ = measured(name, 0)
        num_bytes, seconds, sent = FIRST_BYTES // GROWTH, 0.0, 0
        # All ranks know the same seconds, so all send the same.
        while num_bytes < most_bytes and seconds < ENOUGH_S:
            num_bytes = min(GROWTH * num_bytes, most_bytes)
            seconds, sent = measured(name, num_bytes)
        found["latency_s"][name] = latency_s
        found["bytes_per_s"][name] = sent / max(seconds - latency_s, seconds / 2)
    return found


def _collectives(axis: Axis, device: torch.device, num_bytes: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What to run, as a job does, and the bytes that leave a rank; about `num_bytes`, at least a number a rank."""
    degree = axis.degree
    part = max(1, num_bytes // 4 // degree)
    x = torch.zeros(part * degree, device=device)
    y = torch.zeros_like(x)
    shards, sizes = list(y.view(degree, part).unbind(0)), [part] * degree
    before, after = axis.ranks[axis.index - 1], axis.ranks[(axis.index + 1) % degree]

    def pass_on() -> None:
        # In pairs of one batch, so that no rank waits for one that waits itself.
        peers = ((dist.irecv, y, before), (dist.isend, x, after))
        for work in dist.batch_isend_irecv([dist.P2POp(run, tensor, peer, axis.group) for run, tensor, peer in peers]):
            work.wait()

    others = 4 * part * (degree - 1)
    return {
        "all_to_all": (lambda: exchange(x, sizes, sizes, axis), others),
        "all_gather": (lambda: dist.all_gather(shards, x[:part], group=axis.group), others),
        "all_reduce": (lambda: dist.all_reduce(x, group=axis.group), 2 * others),
        "send": (pass_on, 4 * x.numel()),
    }


def _best(run: Callable[[], Any], device: torch.device, groups: GroupCache) -> float:
    """Seconds of the fastest repeat, in each of which the slowest rank counts."""
    seconds = []
    for _ in range(NUM_REPEATS + 1):
        if groups.world is not None:
            dist.barrier()
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    slowest = torch.tensor(seconds[1:], dtype=torch.float64)
    if groups.world is not None:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(float(slowest.min()), 1e-9)


def _devices(device: torch.device, groups: GroupCache) -> dict[str, Any]:
    """The least memory_bytes of all ranks, and the names of their devices."""
    every: list[Any] = [own := _device(device)]
    if groups.world is not None:
        every = [None] * groups.world_size
        dist.all_gather_object(every, own)
    return {"memory_bytes": min(memory for _, memory in every), "devices": [name for name, _ in every]}


def _device(device: torch.device) -> tuple[str, int]:
    """Its name, and its bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), int(torch.cuda.mem_get_info(device)[1])
    # All of it for each: ranks on a CPU map the same pages of the same file.
    return "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
