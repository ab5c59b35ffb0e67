"""A model computes in parts on the ranks of a context, as its plan says."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .apply import applied
from .attention import Attend
from .context import ParallelContext
from .plan import ModelPlan
from .tokens import TokenPlan
from .whole_shaped import whole_shaped


def cut(
    module: nn.Module, plan: ModelPlan | TokenPlan, context: ParallelContext, attend: Attend | None = None
) -> AbstractContextManager[Any]:
    """`module` computes with its tokens spread over the context's ranks inside of the `with`.

    attend: what its attention modules do; by default exact sequence parallelism.
    """
    if isinstance(plan, ModelPlan):
        return applied(module, plan, context, attend)
    if context.axis("sequence").degree == 1:
        # Nothing is cut, so that the model runs as it is written, to the bit.
        return contextlib.nullcontext()
    return whole_shaped(module, plan, context, attend)
