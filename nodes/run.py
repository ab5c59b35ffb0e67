"""ComfyUI's sampling run, with a turn on the pool around it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from comfy_xdit_nodes.pool import connect
from comfy_xdit_nodes.refuse import refuse_inside

from comfy_xdit.parallel.spec import ModelShape, ParallelSpec, auto

log = logging.getLogger("comfy_xdit")


def sample_on_pool(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's OUTER_SAMPLE wrapper: refuse what can't run, take a turn, have the model loaded, sample."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    refuse_inside(patcher, guider.model_options, guider.conds)
    load = patcher.load_message()
    pool = connect(patcher.setting)
    shape = patcher.model.checkpoint.shape
    choose = chooser(pool.num_ranks, patcher.setting.requested, shape)
    spec = choose(count_chunks(guider))
    log.info("%s on pool %s: %s, %d ranks", shape.title, pool.name, spec, pool.num_ranks)
    with patcher.model.remote.running(pool, load, choose):
        return executor(*args, **kwargs)


def chooser(num_ranks: int, requested: dict[str, int], shape: ModelShape) -> Callable[[int], ParallelSpec]:
    """Number of chunks → degrees. Raises ValueError with every fault of the requested degrees."""
    chosen: dict[int, ParallelSpec] = {}

    def choose(num_chunks: int) -> ParallelSpec:
        if num_chunks not in chosen:
            chosen[num_chunks] = auto(num_ranks, requested=requested, shape=shape, num_chunks=num_chunks)
        return chosen[num_chunks]

    return choose


def count_chunks(guider: Any) -> int:
    """How many kinds of conditioning each step evaluates: 1, or 2 with a negative prompt that counts."""
    kinds = sum(1 for cond in guider.conds.values() if cond)
    alone = math.isclose(getattr(guider, "cfg", 0.0), 1.0)
    if alone and not guider.model_options.get("disable_cfg1_optimization", False):
        return 1
    return max(kinds, 1)
