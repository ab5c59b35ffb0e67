"""ComfyUI's sampling run, with a lease on the pool around it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from comfy.samplers import CFGGuider
from comfy_xdit_nodes.export import require_reachable
from comfy_xdit_nodes.native.checkpoint import ComfyCheckpoint
from comfy_xdit_nodes.native.proven import require_proven
from comfy_xdit_nodes.pool import connect
from comfy_xdit_nodes.refuse import refuse_inside
from comfy_xdit_nodes.remote import poll
from comfy_xdit_nodes.shapes import refuse_shapes
from torch import Tensor

from comfy_xdit.parallel.spec import ParallelSpec, auto

if TYPE_CHECKING:
    from comfy_xdit_nodes.checkpoint import Checkpoint
    from comfy_xdit_nodes.remote import Load

    from comfy_xdit.pool.client import Pool


log = logging.getLogger("comfy_xdit")


def sample_on_pool(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's OUTER_SAMPLE wrapper: refuse what can't run, take a lease, have the model loaded, sample."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    refuse_inside(patcher, guider.model_options, guider.conds)
    refuse_shapes(patcher.model.checkpoint, args[0], guider.conds)
    load = patcher.load_message()
    pool = connect(patcher.setting)
    way_out = f"{patcher.model.checkpoint.way_out}, from a path that each has"
    require_reachable(pool, load.model.path, what="MODEL", way_out=way_out)
    is_native = load.model.source is not None
    if is_native and pool.num_ranks > 1:
        # Before the lease: the first time it takes as long as a self-test, and others may want the pool.
        require_proven(patcher.model.checkpoint)
    # Degrees are chosen inside the lease: it starts a pool that was stopped, and only then it is sure which pool
    # runs, on what, and what was measured of it.
    with pool.lease(poll=poll):
        room_bytes = patcher.model.remote.make_room(pool, load)
        choose = chooser(
            pool,
            patcher.setting.requested,
            patcher.model.checkpoint,
            latent=first_shape(args[0], kwargs.get("latent_shapes")),
            load=load,
            room_bytes=room_bytes,
        )
        spec = choose(count_chunks(guider))
        if is_native and spec.num_ranks > 1:
            # Known by now, but for a pool that was stopped and came back with more ranks.
            require_proven(patcher.model.checkpoint)
        choose = keeping_weights(choose, spec)
        with patcher.model.remote.running(pool, load.spread(spec), choose, trace=patcher.setting.trace):
            return executor(*args, **kwargs)


def chooser(
    pool: Pool,
    requested: dict[str, int],
    checkpoint: Checkpoint | ComfyCheckpoint,
    *,
    latent: tuple[int, ...],
    load: Load,
    room_bytes: int | None = None,
) -> Callable[[int], ParallelSpec]:
    """Number of chunks → degrees: the cheapest for this latent. To be asked inside the pool's lease.

    latent: its shape; of several the first one's. room_bytes: what every rank has for the model; None: not known.

    Raises ValueError with every fault of the requested degrees.
    """

    @functools.cache
    def chosen(num_ranks: int, num_chunks: int) -> ParallelSpec:
        # First without a cost: faults are said before the pool is asked to measure anything.
        by_rule = auto(num_ranks, requested=requested, shape=checkpoint.shape, num_chunks=num_chunks)
        if math.prod(degree for degree in requested.values() if degree) == num_ranks:
            return by_rule
        if len(latent) not in (4, 5):
            log.info("degrees are chosen by rule, not by cost: a latent of shape %s is no picture or video", latent)
            return by_rule
        # Here, not at import: like the pool it takes modules that only Linux has.
        from comfy_xdit.cost.on_pool import cost_on

        cost = cost_on(
            pool,
            checkpoint.network if isinstance(checkpoint, ComfyCheckpoint) else load.model.path,
            latent=latent[-2:],
            frames=latent[2] if len(latent) == 5 else 1,
            images=latent[0],
            chunks=num_chunks,
            element_bytes=getattr(torch, load.model.compute_dtype).itemsize,
            param_bytes=load.param_bytes,
            room_bytes=room_bytes,
            balance=load.model.balance,
        )
        return auto(num_ranks, requested=requested, shape=checkpoint.shape, num_chunks=num_chunks, cost=cost)

    # Asked each time: a pool that was stopped and started anew may have other ranks.
    return lambda num_chunks: chosen(pool.num_ranks, num_chunks)


def first_shape(noise: Tensor, shapes: Any) -> tuple[int, ...]:
    """Of the latent, or of the first of several, which ComfyUI packs into one row; shapes: of all of them."""
    return tuple(shapes[0]) if shapes else tuple(noise.shape)


def keeping_weights(choose: Callable[[int], ParallelSpec], spec: ParallelSpec) -> Callable[[int], ParallelSpec]:
    """As `choose`, but with `spec` throughout where it spreads the weights: nothing is loaded in mid-run."""

    def kept(num_chunks: int) -> ParallelSpec:
        other = choose(num_chunks)
        # Alike degrees of pipe and tensor aren't enough: beside other axes they give ranks other parts.
        whole = spec.pipe == spec.tensor == other.pipe == other.tensor == 1
        return other if whole else spec

    return kept


def count_chunks(guider: Any) -> int:
    """How many kinds of conditioning each step evaluates: 1 where a negative prompt does not count."""
    kinds = sum(1 for cond in guider.conds.values() if cond)
    # Other guiders' own guidance is none of ComfyUI's `cfg`, which they leave at 1.
    is_plain = getattr(type(guider), "predict_noise", None) is CFGGuider.predict_noise
    alone = is_plain and math.isclose(guider.cfg, 1.0)
    if alone and not guider.model_options.get("disable_cfg1_optimization", False):
        return 1
    return max(kinds, 1)
