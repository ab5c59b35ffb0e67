"""What a model computes from no token of a stream is computed once an evaluation, for all of its patches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .paths import find
from .tokens import TokenPlan

Key = tuple[Hashable, int]
"""Rows, and the number of a matrix."""


class OncePerEvaluation:
    """Inside a `with` the matrices that the plan calls `once` remember what they put out.

    These are modulations, and keys and values of a text that is no stream: every patch of an evaluation gives them
    the same numbers. Modulations are a quarter of a Flux's weights, and reading them for each of many small patches
    would take longer than the patch.
    Nothing is taken on trust: an input of another shape is computed, and in the first evaluation that remembers an
    input, each that it stands for is compared with it on the device; `settle` asks how that went.
    """

    def __init__(self, module: nn.Module, plan: TokenPlan) -> None:
        self._linears = [
            (f"{path}.{name}", child)
            for blocks in plan.blocks
            for path, block in find(module, f"{blocks.path}.*")
            for name, child in block.named_modules()
            if isinstance(child, nn.Linear) and f"{name}.".startswith(blocks.once)
        ]
        self._evaluation: Hashable = None
        self._rows: Hashable = None
        self._kept: dict[Key, tuple[Tensor, Tensor]] = {}
        self._compared: set[Key] = set()
        self._trusted: set[Key] = set()
        self._differs: dict[int, Tensor] = {}

    def begin(self, evaluation: Hashable, rows: Hashable) -> None:
        """What follows computes these rows in this evaluation; what was kept of another evaluation goes."""
        if evaluation != self._evaluation:
            self._kept.clear()
            self._trusted |= self._compared
        self._evaluation, self._rows = evaluation, rows

    def settle(self) -> None:
        """All evaluations are done; waits for the device.

        Raises RuntimeError, which names the matrix, where patches of one evaluation gave it other numbers.
        """
        flags = torch.stack(list(self._differs.values())).tolist() if self._differs else []
        for number, differs in zip(self._differs, flags, strict=True):
            if differs:
                raise RuntimeError(f"{self._linears[number][0]} was given other numbers by patches of one evaluation")

    def __enter__(self) -> OncePerEvaluation:
        for number, (_, linear) in enumerate(self._linears):
            # On the instance: a hook could change the output, but not spare the product.
            linear.forward = partial(self._remembered, number, linear.forward)  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        for _, linear in self._linears:
            del linear.forward

    def _remembered(self, number: int, forward: Callable[..., Any], x: Tensor) -> Tensor:
        key = (self._rows, number)
        if key not in self._kept:
            self._kept[key] = x, forward(x)
        given, made = self._kept[key]
        if given.shape != x.shape:
            return forward(x)
        if given is not x and key not in self._trusted:
            self._compared.add(key)
            differs = (given != x).any()
            self._differs[number] = self._differs[number] | differs if number in self._differs else differs
        return made
