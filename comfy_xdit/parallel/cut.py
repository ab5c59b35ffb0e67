"""A model computes in parts on the ranks of a context, as its plan says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .attention import Attend
from .context import ParallelContext
from .model import Model
from .sharded import sharded
from .stage import Stage
from .tokens import TokenPlan
from .whole_shaped import whole_shaped


@contextlib.contextmanager
def cut(
    module: nn.Module, plan: TokenPlan, context: ParallelContext, attend: Attend | None = None
) -> Iterator[None]:
    """`module` computes with its tokens spread over the context's ranks inside of the `with`.

    On the tensor axis it must hold this rank's shards of its weights; what they give is added up.
    attend: what its attention modules do; by default exact sequence parallelism.
    """
    # Where nothing is cut a model runs as it is written; but which attention is diffusers' is never left to it.
    is_wanted = context.axis("sequence").degree > 1 or plan.is_diffusers
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharded(module, plan.tensor, context.axis("tensor")))
        if is_wanted and context.axis("pipe").degree == 1:
            stack.enter_context(whole_shaped(module, plan, context, attend))
        yield


@contextlib.contextmanager
def staged(model: Model, context: ParallelContext) -> Iterator[Stage]:
    """The stage of `model`, whose forward is cut into stages inside of the `with`; `cut` is on already."""
    stage = Stage(context)
    with whole_shaped(model.module, model.family.plan, context, stage=stage):
        yield stage
