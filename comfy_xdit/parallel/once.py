"""What a model computes from no token of a stream is computed once an evaluation, for all of its segments."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .apply import find
from .plan import ModelPlan


class OncePerEvaluation:
    """Inside a `with` the matrices that the plan calls `streamless` remember what they put out.

    These are modulations, and keys and values of a text that is no stream: every segment of an evaluation gets the
    same numbers. Modulations are a quarter of a Flux's weights, and reading them for each of many small patches would
    take longer than the patch.
    """

    def __init__(self, module: nn.Module, plan: ModelPlan) -> None:
        self._linears = [
            child
            for blocks in plan.blocks
            for _, block in find(module, f"{blocks}.*")
            for name, child in block.named_modules()
            if isinstance(child, nn.Linear) and f"{name}.".startswith(plan.streamless)
        ]
        self._evaluation: Hashable = None
        self._rows: Hashable = None
        self._kept: dict[tuple[Hashable, int], Tensor] = {}

    def begin(self, evaluation: Hashable, rows: Hashable) -> None:
        """What follows computes these rows in this evaluation; what was kept of another evaluation goes."""
        if evaluation != self._evaluation:
            self._kept.clear()
        self._evaluation, self._rows = evaluation, rows

    def __enter__(self) -> OncePerEvaluation:
        for number, linear in enumerate(self._linears):
            # On the instance: a hook could change the output, but not spare the product.
            linear.forward = partial(self._remembered, number, linear.forward)  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        for linear in self._linears:
            del linear.forward

    def _remembered(self, number: int, forward: Callable[..., Any], x: Tensor) -> Tensor:
        key = (self._rows, number)
        if key not in self._kept:
            self._kept[key] = forward(x)
        return self._kept[key]
