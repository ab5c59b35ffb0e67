"""What the links between ranks and the devices reach, measured on the ranks themselves in a second or so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

NUM_REPEATS = 3
"""The best of them counts: whatever else runs can only slow one down."""

SIZES = {"cuda": (64 * 2**20, 8192, torch.bfloat16), "cpu": (4 * 2**20, 768, torch.float32)}
"""Bytes that a rank sends in one measurement; side of the multiplied matrices, and their dtype."""


def probe(rank: int, world_size: int, device: torch.device) -> dict[str, Any]:
    """Rates of this rank, the slowest rank's time counting; the same on every rank.

    bytes_per_s: by collective, of what leaves a rank; latency_s: by collective, with next to nothing to send;
    flops_per_s: of large matrices; memory_bytes: of the device, or of the machine.
    Collective over all ranks.
    """
    num_bytes, side, dtype = SIZES["cuda" if device.type == "cuda" else "cpu"]
    a = torch.randn(side, side, device=device).to(dtype)
    flops_per_s = 2 * side**3 / _best(lambda: torch.mm(a, a), device, world_size)
    found: dict[str, Any] = {"flops_per_s": flops_per_s, "memory_bytes": _memory_bytes(device)}
    if world_size > 1:
        found["latency_s"] = {
            name: _best(run, device, world_size) for name, (run, _) in _collectives(rank, world_size, device, 0).items()
        }
        found["bytes_per_s"] = {
            name: sent / _best(run, device, world_size)
            for name, (run, sent) in _collectives(rank, world_size, device, num_bytes).items()
        }
    return found


def _collectives(
    rank: int, world_size: int, device: torch.device, num_bytes: int
) -> dict[str, tuple[Callable[[], Any], int]]:
    """What to run, and the bytes that leave a rank; about `num_bytes`, at least a number for each rank."""
    part = max(1, num_bytes // 4 // world_size)
    x = torch.zeros(part * world_size, device=device)
    y = torch.zeros_like(x)
    shards = list(y.view(world_size, part).unbind(0))

    def pass_on() -> None:
        # In pairs of one batch, so that no rank waits for one that waits itself.
        peers = ((dist.isend, x, (rank + 1) % world_size), (dist.irecv, y, (rank - 1) % world_size))
        for work in dist.batch_isend_irecv([dist.P2POp(run, tensor, peer) for run, tensor, peer in peers]):
            work.wait()

    others = 4 * part * (world_size - 1)
    return {
        "all_to_all": (lambda: dist.all_to_all_single(y, x), others),
        "all_gather": (lambda: dist.all_gather(shards, x[:part]), others),
        "all_reduce": (lambda: dist.all_reduce(x), 2 * others),
        "send": (pass_on, 4 * x.numel()),
    }


def _best(run: Callable[[], Any], device: torch.device, world_size: int) -> float:
    """Seconds of the fastest repeat, in each of which the slowest rank counts."""
    seconds = []
    for _ in range(NUM_REPEATS + 1):
        if world_size > 1:
            dist.barrier()
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    slowest = torch.tensor(seconds[1:], dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(float(slowest.min()), 1e-9)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    # All of it for each: ranks on a CPU map the same pages of the same file.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
