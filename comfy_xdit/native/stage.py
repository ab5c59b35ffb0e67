"""What a rank reads of a model of ComfyUI's own class that is cut into pipeline stages, or over tensor."""

from __future__ import annotations

from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.spec import WeightShare
from comfy_xdit.parallel.stage_blocks import require_in_order
from comfy_xdit.parallel.stages import block_costs, block_paths, keep_stage, stages
from comfy_xdit.parallel.tensor import Shard, keep_own_heads, shards

from .family import PLAIN, ComfyFamily
from .load import Mine


def keep_share(net: nn.Module, family: ComfyFamily, share: WeightShare) -> tuple[range, Mine]:
    """Leaves the blocks of other stages, and other ranks' heads, out of a transformer whose weights are not read yet.

    Returns the blocks that stay, numbered through the plan's lists, and what is to be read: their weights, or this
    rank's shards of them, and all that is outside of blocks. Raises InputError where the model cannot be cut into so
    many stages or shards, and, when they are read, for weights of which no part can be taken.
    """
    plan = family.plan
    if share.num_stages > 1:
        require_in_order(plan, family.title)
    costs = block_costs(net, plan, share.balance)
    own = stages(costs, share.num_stages)[share.stage]
    others = tuple(f"{path}." for number, path in enumerate(block_paths(net, plan)) if number not in own)
    keep_stage(net, plan, own)
    parts = _own_shards(net, family, share)

    def mine(key: str, weight: Tensor) -> Tensor | None:
        if key.startswith(others):
            return None
        if key not in parts:
            return weight
        if weight.dtype not in PLAIN:
            raise InputError(f"{family.title} can't run with tensor when its weights are quantised; use tensor=1")
        part = parts[key]
        return None if part is None else part.of(weight)

    return own, mine


def _own_shards(net: nn.Module, family: ComfyFamily, share: WeightShare) -> dict[str, Shard | None]:
    if share.num_shards == 1:
        return {}
    if family.plan.tensor is None:
        raise InputError(f"nobody has shown how {family.title} is cut over tensor; use tensor=1")
    parts = shards(net, family.plan.tensor, share)
    keep_own_heads(net, family.plan.tensor, share)
    return parts
