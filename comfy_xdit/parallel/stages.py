"""Pipeline stages: which run of a model's blocks each rank on the pipe axis holds."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError

from .block_call import Call
from .spec import BALANCES
from .tokens import Blocks, TokenPlan

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


def block_paths(module: nn.Module, plan: TokenPlan) -> list[str]:
    """Paths of the module's blocks in the order in which they run."""
    lists = [(blocks.path, module.get_submodule(blocks.path)) for blocks in plan.blocks]
    return [f"{path}.{number}" for path, found in lists for number, _ in enumerate(found.children())]


def keep_stage(module: nn.Module, plan: TokenPlan, stage: range) -> None:
    """Leave out all blocks but those of a stage, numbered as in `block_paths`."""
    gives = {blocks.path: blocks.gives for blocks in plan.blocks}
    for number, path in enumerate(block_paths(module, plan)):
        if number not in stage:
            blocks, _, name = path.rpartition(".")
            block = Absent(module.get_submodule(path), gives[blocks], is_written=not plan.untouched)
            module.get_submodule(blocks)._modules[name] = block


def block_costs(module: nn.Module, plan: TokenPlan, balance: str = BALANCES[0]) -> list[int]:
    """What each block takes of what stages are to have alike: an evaluation's time, in units of its own (see
    `cost_of`), or memory, in elements of weights. No weight need be there.
    """
    rules = {blocks.path: blocks for blocks in plan.blocks}
    costs = []
    for path in block_paths(module, plan):
        rule, block = rules[path.rpartition(".")[0]], module.get_submodule(path)
        weights = weights_of(block)
        if balance == "memory":
            costs.append(sum(elements for _, elements, _ in weights))
            continue
        matrices = [(name, elements, width) for name, elements, width in weights if width]
        few, none = (_elements(matrices, names) for names in (rule.light, rule.once))
        costs.append(cost_of(_elements(matrices, ("",)) - few - none, few, hidden=stream_width(block, rule)))
    return costs


def stream_width(block: nn.Module, rule: Blocks) -> int:
    """Channels of the tokens that a block hands on: what most of the matrices read that multiply all of them."""
    few = (*rule.light, *rule.once)
    widths = Counter(width for name, _, width in weights_of(block) if width and not name.startswith(few))
    # Where a block is a matrix and another one back, as Flux's single ones, the first reads the tokens.
    return max(widths, key=lambda width: (widths[width], -width), default=0)


def _elements(weights: list[tuple[str, int, int]], starts: tuple[str, ...]) -> int:
    """Of all whose names start so."""
    return sum(elements for name, elements, _ in weights if name.startswith(starts))


def weights_of(block: nn.Module) -> list[tuple[str, int, int]]:
    """(name, elements, width of the input) of a block's weights; the width is 0 for those that it does not multiply by.

    A quantised layer has no weight yet.
    """
    found = []
    for name, layer in block.named_modules():
        own = dict(layer.named_parameters(name, recurse=False))
        width = getattr(layer, "in_features", None)
        if isinstance(width, int) and hasattr(layer, "out_features"):
            own.pop(f"{name}.weight", None)
            found.append((f"{name}.weight", width * int(layer.out_features), width))  # type: ignore[arg-type]
        found += [(key, weight.numel(), 0) for key, weight in own.items()]
    return found


def cost_of(image_elements: int, text_elements: int, *, hidden: int) -> int:
    """The time of a block, relative to other blocks.

    image_elements: of matrices that multiply every image token; text_elements: of those for text alone.
    A pipeline is as fast as its slowest stage, so stages share out time, not weights: half of a double block
    of Flux works on text, which is short, and its modulation once for a row. Attention to S tokens is as much
    as 2 · S · hidden elements more.
    """
    return TOKENS_RATIO * (image_elements + 2 * TYPICAL_TOKENS * hidden) + text_elements


class Absent(nn.Module):
    """Stands for a block of another stage: no weight of it is here, and its outputs are no numbers (NaN).

    It keeps the other blocks' places in their list, so that paths and numbers mean the same on every stage. It has the
    block's attributes, which a model's code between blocks may read; weights among them are on the meta device.
    gives: the arguments that a block returns, in its order, named as `Call` says.
    is_written: a model's code may write into its outputs, which have memory then.
    signature: of the block's forward.
    """

    def __init__(self, block: nn.Module, gives: tuple[str, ...], *, is_written: bool = True) -> None:
        super().__init__()
        # Not a submodule: nothing of it is to be loaded, moved, or counted.
        self.__dict__["block"] = block.to("meta")
        self.signature = inspect.signature(block.forward)
        self._gives, self._is_written = gives, is_written

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(self.signature, args, kwargs)
        # Not what came in: code that used it for a block's output would give a wrong picture, and nobody would know.
        made = tuple(x if x is None else self._no_numbers(x) for x in map(call.get, self._gives))
        return made if len(made) > 1 else made[0]

    def _no_numbers(self, like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan) if self._is_written else like.new_full((), torch.nan).expand_as(like)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


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
