"""Single evaluations on a pipeline: exact, row after row through the stages, which are idle before and after.

Between two evaluations asked for from outside nothing can be kept or begun, so no patch can follow another
here; but rows of a batch (cond and uncond, several images) don't see each other and do follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .context import ParallelContext
from .cut import staged
from .model import Call, Model, first_latent, num_rows
from .stage import Stage


def drained(model: Model, calls: list[Call], context: ParallelContext) -> list[Tensor]:
    """The model's output for each call, on every stage. Collective over the pipe axis.

    Of its blocks this rank holds those of its stage, and the others are `Absent`.
    """
    family = model.family
    with staged(model, context) as stage:
        rows = [[family.of_rows(call, range(row, row + 1)) for row in range(num_rows(call))] for call in calls]
        runs = [[lambda row=row: family.run(model, row) for row in of_call] for of_call in rows]
        shapes = [family.output_shape(model, call) for call in calls]
        likes = [
            first_latent(call).new_empty(shape, dtype=model.compute_dtype)
            for call, shape in zip(calls, shapes, strict=True)
        ]
        return one_after_another(stage, runs, likes)


def one_after_another(
    stage: Stage, runs: Sequence[Sequence[Callable[[], Tensor]]], likes: Sequence[Tensor]
) -> list[Tensor]:
    """What the runs of each batch give, along dim 0 together, on every stage.

    runs: batch → its rows; each calls the stage's model once. likes: tensors of the batches' outputs' shape, dtype and
    device, whose numbers are of no matter. Collective over the pipe axis.
    """
    outputs = []
    for rows in runs:
        parts = [stage.forward(row) for row in rows]
        outputs.append(torch.cat([part for part in parts if part is not None]) if stage.is_last else None)
    # What the last stage has, the first has sent: nothing is under way after this.
    whole = [_from_last(output, like, stage) for output, like in zip(outputs, likes, strict=True)]
    stage.settle()
    stage.settle()
    return whole


def share_of_time(num_rows: int, num_stages: int) -> float:
    """Which part of the time a stage computes, when so many rows go through stages that are idle before and after."""
    return num_rows / (num_rows + num_stages - 1)


def _from_last(output: Tensor | None, like: Tensor, stage: Stage) -> Tensor:
    """The last stage's output on every stage."""
    axis = stage.axis
    output = torch.empty_like(like) if output is None else output.contiguous()
    if (output.shape, output.dtype) != (like.shape, like.dtype):
        made = f"{tuple(output.shape)}, {output.dtype}"
        raise RuntimeError(f"an output of {made}; the other stages wait for {tuple(like.shape)}, {like.dtype}")
    sent = output.nbytes * (axis.degree - 1) if stage.is_last else 0
    with axis.traffic.timed("broadcast", sent, output.device):
        dist.broadcast(output, axis.ranks[-1], group=axis.group)
    return output
