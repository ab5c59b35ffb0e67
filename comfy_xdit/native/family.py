"""What one family of ComfyUI's own model classes declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from comfy_xdit.parallel.spec import ModelShape
from comfy_xdit.parallel.tokens import TokenPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComfyFamily:
    """How ComfyUI's own models of a family run on several ranks.

    name: what commands say; title: what people say.
    kinds: names of ComfyUI's configuration classes (`comfy.supported_models`) of these models.
    plan: where tokens are cut, and where they are joined.
    num_heads(transformer): attention heads; of several kinds of attention the fewest.
    rows: the transformer's arguments, beside x and the timestep, with an entry for each row of the batch along dim 0
    (or one for all): tensors, or lists of them. constants: those that are the same for all rows.
    Any other argument is refused by name: nobody has shown that it comes out right.
    options: entries of transformer_options that the transformer's own code reads.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    plan: TokenPlan
    num_heads: Callable[[nn.Module], int]
    rows: tuple[str, ...]
    constants: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def shape(self, transformer: nn.Module) -> ModelShape:
        """What limits the degrees of this model; it may be one without weights."""
        num_blocks = sum(len(list(transformer.get_submodule(blocks.path).children())) for blocks in self.plan.blocks)
        return ModelShape(title=self.title, num_heads=self.num_heads(transformer), num_blocks=num_blocks)
