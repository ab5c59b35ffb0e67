"""Pipeline stages: which run of a model's blocks each rank on the pipe axis holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn

from .plan import ModelPlan

TYPICAL_TOKENS = 4096
"""Image tokens of 1024 × 1024 pixels: how much attention counts beside the weights."""  # noqa: RUF001


def stages(costs: Sequence[int], num_stages: int) -> list[range]:
    """Runs of blocks, one for each stage, none empty, whose costliest is as cheap as can be.

    Among those the runs are as even as possible (least sum of squares): eight blocks on five stages make
    2, 2, 2, 1, 1 and never a stage of leftovers. Raises ValueError when there are more stages than blocks.
    """
    num_blocks = len(costs)
    if not 1 <= num_stages <= num_blocks:
        raise ValueError(f"{num_blocks} blocks cannot make {num_stages} stages; use 1 to {num_blocks}")
    sums = [0, *accumulate(costs)]
    limit = _least_limit(sums, num_stages)
    # best[end]: of the first `end` blocks on the stages so far, (sum of squares, the ends of the stages).
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(num_stages):
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for begin, (squares, ends) in best.items():
            for end in range(begin + 1, num_blocks + 1):
                cost = sums[end] - sums[begin]
                if cost > limit:
                    break
                # Ties go to the longer first stages, as uneven shards do elsewhere.
                option = (squares + cost * cost, (*ends, end))
                old = reached.get(end)
                if old is None or option[0] < old[0] or (option[0] == old[0] and option[1] > old[1]):
                    reached[end] = option
        best = reached
    ends = best[num_blocks][1]
    return [range(begin, end) for begin, end in zip((0, *ends[:-1]), ends, strict=True)]


def block_paths(module: nn.Module, plan: ModelPlan) -> list[str]:
    """Paths of the module's blocks in the order in which they run."""
    return [f"{name}.{i}" for name in plan.blocks for i, _ in enumerate(module.get_submodule(name).children())]


def block_costs(module: nn.Module, plan: ModelPlan, *, hidden: int) -> list[int]:
    """What each block weighs: its parameters, and attention as so many parameters more.

    A parameter takes two operations a token, attention to S tokens 4 · S · hidden: as 2 · S · hidden parameters.
    """
    blocks = [module.get_submodule(path) for path in block_paths(module, plan)]
    attention = 2 * TYPICAL_TOKENS * hidden
    return [sum(weight.numel() for weight in block.parameters()) + attention for block in blocks]


class Absent(nn.Module):
    """Stands for a block of another stage: holds nothing, and lets the streams through unchanged.

    It keeps the other blocks' places in their list, so that paths and numbers mean the same on every stage.
    streams: the keyword arguments that a block returns, in its order.
    """

    def __init__(self, streams: tuple[str, ...]) -> None:
        super().__init__()
        self._streams = streams

    def forward(self, **kwargs: Tensor) -> tuple[Tensor, ...]:
        return tuple(kwargs[name] for name in self._streams)


def _least_limit(sums: list[int], num_stages: int) -> int:
    """The least limit that so many stages can keep, by halving between the possible costs."""
    num_blocks = len(sums) - 1
    low, high = max(sums[i + 1] - sums[i] for i in range(num_blocks)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if _stages_needed(sums, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def _stages_needed(sums: list[int], limit: int) -> int:
    needed, begin = 1, 0
    for end in range(1, len(sums)):
        if sums[end] - sums[begin] > limit:
            needed, begin = needed + 1, end - 1
    return needed
