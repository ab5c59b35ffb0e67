"""A model computes in parts on the ranks of a context, as its plan says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from .apply import applied
from .attention import Attend
from .context import ParallelContext
from .model import Model
from .plan import ModelPlan
from .stage import Stage
from .tokens import TokenPlan
from .whole_shaped import whole_shaped

if TYPE_CHECKING:
    from .stage import PipelineModel


def cut(
    module: nn.Module, plan: ModelPlan | TokenPlan, context: ParallelContext, attend: Attend | None = None
) -> AbstractContextManager[Any]:
    """`module` computes with its tokens spread over the context's ranks inside of the `with`.

    attend: what its attention modules do; by default exact sequence parallelism.
    """
    if isinstance(plan, ModelPlan):
        return applied(module, plan, context, attend)
    if context.axis("sequence").degree == 1 or context.axis("pipe").degree > 1:
        # Nothing is cut, so that the model runs as it is written, to the bit; or `staged` does it.
        return contextlib.nullcontext()
    return whole_shaped(module, plan, context, attend)


@contextlib.contextmanager
def staged(model: Model, context: ParallelContext) -> Iterator[Stage]:
    """The stage of `model`, whose forward is cut into stages inside of the `with`; `cut` is on already."""
    stage, plan = Stage(context), model.family.plan
    if isinstance(plan, ModelPlan):
        known = cast("PipelineModel", model)
        with stage.between([known.module.get_submodule(path) for path in known.block_paths], known.stage):
            yield stage
    else:
        with whole_shaped(model.module, plan, context, stage=stage):
            yield stage
