"""What a rank reads of a model of ComfyUI's own class that is cut into pipeline stages."""

from __future__ import annotations

from torch import Tensor, nn

from comfy_xdit.parallel.spec import WeightShare
from comfy_xdit.parallel.stage_blocks import require_in_order
from comfy_xdit.parallel.stages import block_costs, block_paths, keep_stage, stages

from .family import ComfyFamily
from .load import Mine


def keep_share(net: nn.Module, family: ComfyFamily, share: WeightShare) -> tuple[range, Mine]:
    """Leaves the blocks of other stages out of a transformer whose weights are not read yet.

    Returns the blocks that stay, numbered through the plan's lists, and what is to be read: their weights and all
    that is outside of blocks. Raises InputError where the model cannot be cut into so many stages.
    """
    plan = family.plan
    if share.num_stages > 1:
        require_in_order(plan, family.title)
    costs = block_costs(net, plan, share.balance)
    own = stages(costs, share.num_stages)[share.stage]
    others = tuple(f"{path}." for number, path in enumerate(block_paths(net, plan)) if number not in own)
    keep_stage(net, plan, own)

    def mine(key: str, weight: Tensor) -> Tensor | None:
        return None if key.startswith(others) else weight

    return own, mine
