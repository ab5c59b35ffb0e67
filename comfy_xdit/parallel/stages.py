"""Pipeline stages: which run of a model's blocks each rank on the pipe axis holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from comfy_xdit.errors import InputError

from .plan import ModelPlan
from .spec import BALANCES

TYPICAL_TOKENS = 4096
"""Image tokens of 1024 × 1024 pixels: how much attention counts beside the weights."""  # noqa: RUF001

TOKENS_RATIO = 16
"""Image tokens for each text token, usually: 4096 and 256."""


def stages(costs: Sequence[int], num_stages: int) -> list[range]:
    """Runs of blocks, one for each stage, none empty, whose costliest is as cheap as can be.

    Among those the runs are as even as possible (least sum of squares): eight blocks on five stages make
    2, 2, 2, 1, 1 and never a stage of leftovers. Raises InputError when there are more stages than blocks.
    """
    num_blocks = len(costs)
    if not 1 <= num_stages <= num_blocks:
        raise InputError(f"{num_blocks} blocks cannot make {num_stages} stages; use 1 to {num_blocks}")
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


def block_costs(module: nn.Module, plan: ModelPlan, *, hidden: int, balance: str = BALANCES[0]) -> list[int]:
    """What each block takes of what stages are to have alike: an evaluation's time, in units of its own (see
    `cost_of`), or memory, in elements of weights.
    """
    costs = []
    for path in block_paths(module, plan):
        weights = dict(module.get_submodule(path).named_parameters())
        if balance == "memory":
            costs.append(sum(weight.numel() for weight in weights.values()))
            continue
        elements = {"image": 0, "text": 0}
        for name, weight in weights.items():
            if weight.dim() >= 2 and not name.startswith(plan.once):
                elements["text" if name.startswith(plan.text_only) else "image"] += weight.numel()
        costs.append(cost_of(elements["image"], elements["text"], hidden=hidden))
    return costs


def cost_of(image_elements: int, text_elements: int, *, hidden: int) -> int:
    """The time of a block, relative to other blocks.

    image_elements: of matrices that multiply every image token; text_elements: of those for text alone.
    A pipeline is as fast as its slowest stage, so stages share out time, not weights: half of a double block
    of Flux works on text, which is short, and its modulation once for a row. Attention to S tokens is as much
    as 2 · S · hidden elements more.
    """
    return TOKENS_RATIO * (image_elements + 2 * TYPICAL_TOKENS * hidden) + text_elements


class Absent(nn.Module):
    """Stands for a block of another stage: holds nothing, and lets the streams through unchanged.

    It keeps the other blocks' places in their list, so that paths and numbers mean the same on every stage.
    streams: the arguments that a block returns, as `ModelPlan.streams` says.
    """

    def __init__(self, streams: tuple[str, ...]) -> None:
        super().__init__()
        self._streams = streams

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        given = by_name(self._streams, args, kwargs)
        through = tuple(given[name] for name in self._streams)
        return through if len(through) > 1 else through[0]


def by_name(streams: tuple[str, ...], args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a block by keyword."""
    return dict(zip(streams, args, strict=False)) | kwargs


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
