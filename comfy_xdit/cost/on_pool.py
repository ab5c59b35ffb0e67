"""The cost of specs for a job on a running pool: what `auto` goes by in ComfyUI."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy_xdit.parallel.spec import BALANCES, ParallelSpec

from .arithmetic import Network, read_network
from .choose import ranking
from .measured import measure
from .work import Work

if TYPE_CHECKING:
    from comfy_xdit.pool.client import Pool

log = logging.getLogger("comfy_xdit")

Cost = Callable[[ParallelSpec], Any]

ROOM_STEP_BYTES = 2**28


def cost_on(
    pool: Pool,
    model: str | Network,
    *,
    latent: tuple[int, int],
    frames: int = 1,
    images: int,
    chunks: int,
    element_bytes: int,
    param_bytes: float,
    room_bytes: int | None = None,
    balance: str = BALANCES[0],
) -> Cost | None:
    """What a spec costs for a model, or the one in the file of that path, on this pool's own links and devices.

    latent, frames: as of `Work`. param_bytes: of one parameter as the workers keep it, on average; not looked at where
    the model says it. room_bytes: what every rank has for the model, used by nobody else; None: its whole device, as it
    was measured.
    None where there is nothing to choose, and for models without a cost model, which the log says. The pool
    measures itself when it hasn't yet. Raises PoolError when it cannot.
    """
    if pool.num_ranks == 1:
        return None
    try:
        network = model if isinstance(model, Network) else _of_file(model, param_bytes)
    except (ValueError, OSError) as error:
        log.info("degrees are chosen by rule, not by cost: %s", error)
        return None
    work = Work(
        latent=latent,
        frames=frames,
        text_tokens=network.text_tokens,
        images=images,
        chunks=chunks,
        element_bytes=element_bytes,
        balance=balance,
    )
    links, device = measure(pool)
    if room_bytes is not None:
        # In steps: what is kept of a choice holds for the next run too.
        room_bytes -= room_bytes % ROOM_STEP_BYTES
        device = dataclasses.replace(device, memory_bytes=min(device.memory_bytes, room_bytes))
    return _ranking(network, work, links, device)


def _of_file(path: str, param_bytes: float) -> Network:
    file = os.stat(path)
    return _network(path, (file.st_ino, file.st_size, file.st_mtime_ns), param_bytes)


@functools.lru_cache(maxsize=8)
def _network(path: str, stamp: tuple[int, ...], param_bytes: float) -> Network:
    """The network in a file, its parameters as the workers keep them. stamp: changes with the file."""
    return dataclasses.replace(_read(path, stamp), param_bytes=param_bytes)


@functools.lru_cache(maxsize=8)
def _read(path: str, stamp: tuple[int, ...]) -> Network:
    return read_network(path)


_ranking = functools.lru_cache(maxsize=32)(ranking)
"""Which keeps what each spec costs: the next run with the same work has nothing to compute."""
