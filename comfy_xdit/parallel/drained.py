"""Single evaluations on a pipeline: exact, row after row through the stages, which are idle before and after.

Between two evaluations asked for from outside nothing can be kept or begun, so no patch can follow another
here; but rows of a batch (cond and uncond, several images) don't see each other and do follow each other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .context import ParallelContext
from .model import Call, num_rows
from .stage import PipelineModel, Stage


def drained(model: PipelineModel, calls: list[Call], context: ParallelContext) -> list[Tensor]:
    """The model's output for each call, on every stage. Collective over the pipe axis."""
    outputs = []
    with Stage(model, context) as stage:
        for call in calls:
            rows = [model.family.of_rows(call, range(row, row + 1)) for row in range(num_rows(call))]
            parts = [_forward(model, stage, row) for row in rows]
            outputs.append(torch.cat([part for part in parts if part is not None]) if stage.is_last else None)
        # What the last stage has, the first has sent: nothing is under way after this.
        whole = [_from_last(output, call, model, context) for output, call in zip(outputs, calls, strict=True)]
        stage.settle()
        stage.settle()
    return whole


def share_of_time(num_rows: int, num_stages: int) -> float:
    """Which part of the time a stage computes, when so many rows go through stages that are idle before and after."""
    return num_rows / (num_rows + num_stages - 1)


def _forward(model: PipelineModel, stage: Stage, call: Call) -> Tensor | None:
    out = stage.forward(model.family.arguments(model, call))
    return None if out is None else model.family.output(out, call)


def _from_last(output: Tensor | None, call: Call, model: PipelineModel, context: ParallelContext) -> Tensor:
    """The last stage's output on every stage."""
    x, axis = call["x"], context.axis("pipe")
    if output is None:
        output = x.new_empty(model.family.output_shape(model, call), dtype=model.compute_dtype)
    output = output.contiguous()
    sent = output.nbytes * (axis.degree - 1) if axis.index == axis.degree - 1 else 0
    with axis.traffic.timed("broadcast", sent, x.device):
        dist.broadcast(output, axis.ranks[-1], group=axis.group)
    return output
