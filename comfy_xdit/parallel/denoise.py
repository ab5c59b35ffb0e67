"""One evaluation of a transformer over all ranks: rows are dealt, run, and gathered on rank 0."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comfy_xdit.errors import InputError

from .context import ParallelContext
from .cut import cut
from .model import Call, Model, first_latent, num_rows
from .sequence import shard_sizes, shard_starts
from .spec import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `start` to `stop` of call number `call`: what one lane runs as one batch."""

    call: int
    start: int
    stop: int

    @property
    def rows(self) -> range:
        return range(self.start, self.stop)


def denoise(
    model: Model, calls: list[Call], chunks: list[int], context: ParallelContext
) -> tuple[list[Tensor] | None, dict[str, Any]]:
    """ComfyUI's output for each call, on rank 0 (None elsewhere), and a report on this rank's part.

    calls: the same on every rank, as `messages.Denoise` says; chunks: of how many equal chunks each is made.
    report: as `ParallelContext.report`, and rows, how many this rank ran.
    Collective over all ranks. Raises InputError, on every rank alike, for calls that don't fit the spec.
    """
    check_calls(model, calls, context)
    _check_chunks(calls, chunks)
    with cut(model.module, model.family.plan, context):
        outputs = evaluate(model, calls, context)
    mine = deal([num_rows(call) for call in calls], cfg=context.spec.cfg, dp=context.spec.dp)[context.lane]
    report = {**context.report(), "rows": sum(piece.stop - piece.start for piece in mine)}
    return (outputs if context.rank == 0 else None), report


def check_calls(model: Model, calls: list[Call], context: ParallelContext) -> None:
    """Raises InputError, on every rank alike, for calls that the model does not take or that don't fit the spec.

    Before the first message of a job: after it, ranks could not stop where they stand. So it looks at the calls of all
    lanes: a fault that only some ranks see would leave the others waiting for them.
    """
    faults = check(context.spec, num_ranks=context.world_size, shape=model.shape)
    if faults:
        raise InputError("; ".join(faults))
    for call in calls:
        model.family.check(model, call)


def evaluate(model: Model, calls: list[Call], context: ParallelContext) -> list[Tensor]:
    """ComfyUI's output for each call, on every rank; `model` has its plan applied, the calls are checked.

    Collective over all ranks.
    """
    lanes = deal([num_rows(call) for call in calls], cfg=context.spec.cfg, dp=context.spec.dp)
    mine = [model.family.of_rows(calls[piece.call], piece.rows) for piece in lanes[context.lane]]
    if context.spec.pipe > 1:
        from .drained import drained

        outputs = drained(model, mine, context)
    else:
        outputs = [model.family.run(model, call) for call in mine]
    shapes = [model.family.output_shape(model, call) for call in calls]
    like = first_latent(calls[0]).new_empty(0, dtype=model.compute_dtype)
    return share(shapes, lanes, outputs, like, context)


def deal(batches: list[int], *, cfg: int, dp: int) -> list[list[Piece]]:
    """What each lane runs, by `ParallelContext.lane`: the rows of all calls, cut over cfg, then over dp.

    The conditional chunk comes before the unconditional one, or is a call before it, so two cfg ranks get
    one each; a lone chunk of several rows is shared by both. A lane may get nothing.
    """
    lanes = []
    for cfg_start, cfg_size in _spans(sum(batches), cfg):
        lanes.append([(cfg_start + start, size) for start, size in _spans(cfg_size, dp)])
    # dp is the outer axis of the mesh.
    ordered = [lanes[cfg_index][dp_index] for dp_index in range(dp) for cfg_index in range(cfg)]
    return [_pieces(batches, start, size) for start, size in ordered]


def _spans(length: int, degree: int) -> list[tuple[int, int]]:
    sizes = shard_sizes(length, degree)
    return list(zip(shard_starts(sizes), sizes, strict=True))


def _pieces(batches: list[int], start: int, size: int) -> list[Piece]:
    pieces = []
    for call, (first, batch) in enumerate(zip(shard_starts(batches), batches, strict=True)):
        begin, end = max(start, first), min(start + size, first + batch)
        if begin < end:
            pieces.append(Piece(call=call, start=begin - first, stop=end - first))
    return pieces


def _check_chunks(calls: list[Call], chunks: list[int]) -> None:
    """Raises InputError for calls that are not each made of so many equal chunks."""
    if not calls or len(chunks) != len(calls):
        raise InputError(f"{len(calls)} calls came with {len(chunks)} numbers of chunks; send a call, and one for each")
    for call, count in zip(calls, chunks, strict=True):
        batch = num_rows(call)
        if count < 1 or batch % count:
            raise InputError(f"a batch of {batch} is not made of {count} equal chunks; send whole chunks")


def share(
    whole: list[tuple[int, ...]],
    lanes: list[list[Piece]],
    outputs: list[Tensor],
    like: Tensor,
    context: ParallelContext,
) -> list[Tensor]:
    """The whole outputs, on every rank. Lanes send their pieces to each other; a lane's ranks hold the same.

    whole: each call's shape. like: with the outputs' dtype and device.
    """
    axis = context.axis("lanes")
    if axis.degree == 1:
        return outputs
    shapes = [[(len(piece.rows), *whole[piece.call][1:]) for piece in pieces] for pieces in lanes]
    sizes = [sum(math.prod(shape) for shape in of_lane) for of_lane in shapes]
    flat = like.new_zeros(max(sizes))
    if outputs:
        flat[: sizes[axis.index]] = torch.cat([output.reshape(-1) for output in outputs])
    received = flat.new_empty((axis.degree, flat.numel()))
    with axis.traffic.timed("all_gather", flat.nbytes * (axis.degree - 1), flat.device):
        dist.all_gather(list(received.unbind(0)), flat, group=axis.group)
    parts: list[list[tuple[int, Tensor]]] = [[] for _ in whole]
    for lane, pieces in enumerate(lanes):
        views = received[lane, : sizes[lane]].split([math.prod(shape) for shape in shapes[lane]])
        for piece, view, shape in zip(pieces, views, shapes[lane], strict=True):
            parts[piece.call].append((piece.start, view.view(shape)))
    return [torch.cat([part for _, part in sorted(found, key=lambda item: item[0])]) for found in parts]
