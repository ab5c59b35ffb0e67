"""The blocks of one pipeline stage in a module with a `TokenPlan`, and what is checked and done at its two ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError

from .paths import find
from .stage import Stage
from .stages import Absent
from .tokens import Blocks, TokenPlan

Kind = tuple[tuple[int, ...], torch.dtype] | None
"""Shape and dtype of a stream; None where there is none."""


ONCE = "in a pipeline each block runs once, in order"


def require_in_order(plan: TokenPlan, title: str) -> None:
    """Raises InputError where no pipeline can be made of the blocks."""
    if not plan.in_order:
        raise InputError(f"{title} cannot be cut into pipeline stages, as its blocks take turns; use pipe=1")


class StageBlocks:
    """One stage of a module, of which the other stages' blocks are `Absent`.

    Blocks are numbered in the plan's order. Raises InputError for a plan that is not in order.
    """

    def __init__(self, module: nn.Module, plan: TokenPlan, stage: Stage) -> None:
        require_in_order(plan, type(module).__name__)
        self.stage = stage
        found = [block for blocks in plan.blocks for block in find(module, f"{blocks.path}.*")]
        self._paths = [path for path, _ in found]
        self._own = [number for number, (_, block) in enumerate(found) if not isinstance(block, Absent)]
        first, last = self._own[0], self._own[-1]
        assert self._own == list(range(first, last + 1)), "a stage's blocks follow one another"
        assert stage.is_first == (first == 0) and stage.is_last == (last + 1 == len(found)), "stages follow one another"
        self._before, self._last = first - 1, last
        self._next = 0
        self._entered: list[Kind] = []

    def passes(self, number: int) -> bool:
        """Whether the block is another stage's, and not the one whose outputs arrive."""
        return number not in self._own and number != self._before

    def ends_with(self, number: int) -> bool:
        """Whether the forward ends when this block has run."""
        return number == self._last and self.stage.ends

    def begin(self) -> None:
        """A forward begins."""
        self._next = 0

    def enter(self, number: int, streams: list[Tensor | None]) -> None:
        """A block begins. streams: what it will give back, as it is now.

        Raises RuntimeError, which names it, where it is not its turn.
        """
        if number != self._next:
            due = self._paths[self._next] if self._next < len(self._paths) else "no block"
            raise RuntimeError(f"{self._paths[number]} runs where {due} is due; {ONCE}")
        self._next += 1
        self._entered = [_kind(x) for x in streams]

    def leave(self, number: int, rule: Blocks, made: Any) -> Any:
        """What the block that has run gives here; after the last one the forward ends.

        Raises RuntimeError where another stage could not stand in for the block.
        """
        if number == self._before:
            return self.stage.receive(made)
        several = made if isinstance(made, (tuple, list)) else (made,)
        if len(several) != len(rule.gives) or isinstance(made, Tensor) != (len(rule.gives) == 1):
            raise RuntimeError(f"{self._paths[number]} does not give {rule.gives} alone; nothing can stand in for it")
        if number == self._last and not self.stage.is_last:
            went = [_kind(x) for x in several]
            if went != self._entered:
                raise RuntimeError(f"{self._paths[number]} gives {went}, and the next stage waits for {self._entered}")
        if number == self._last:
            self.stage.leave(made)
        return made

    def settle(self) -> None:
        """A forward of the last stage is over. Raises RuntimeError where a block did not run."""
        if self._next != len(self._paths):
            raise RuntimeError(f"{self._paths[self._next]} did not run; {ONCE}")


def _kind(x: Tensor | None) -> Kind:
    return None if x is None else (tuple(x.shape), x.dtype)
