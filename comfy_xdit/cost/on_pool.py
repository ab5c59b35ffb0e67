"""The cost of specs for a job on a running pool: what `auto` goes by in ComfyUI."""

from __future__ import annotations

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


def cost_on(
    pool: Pool,
    path: str,
    *,
    latent: tuple[int, int],
    images: int,
    chunks: int,
    element_bytes: int,
    balance: str = BALANCES[0],
) -> Cost | None:
    """What a spec costs for the model in the file `path` on this pool's own links and devices.

    None where there is nothing to choose, and for models without a cost model, which the log says. The pool
    measures itself when it hasn't yet. Raises PoolError when it cannot.
    """
    if pool.num_ranks == 1:
        return None
    try:
        file = os.stat(path)
        network = _network(path, (file.st_ino, file.st_size, file.st_mtime_ns))
    except (ValueError, OSError) as error:
        log.info("degrees are chosen by rule, not by cost: %s", error)
        return None
    work = Work(
        latent=latent,
        text_tokens=network.text_tokens,
        images=images,
        chunks=chunks,
        element_bytes=element_bytes,
        balance=balance,
    )
    return _ranking(network, work, *measure(pool))


@functools.lru_cache(maxsize=8)
def _network(path: str, stamp: tuple[int, ...]) -> Network:
    """As `read_network`, once for a file. stamp: changes when the file does."""
    return read_network(path)


_ranking = functools.lru_cache(maxsize=32)(ranking)
"""Which keeps what each spec costs: the next run with the same work has nothing to compute."""
