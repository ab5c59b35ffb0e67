"""What a family declares about its diffusers model, as data; `apply.py` and `whole_shaped.py` put it into effect."""

from __future__ import annotations

import dataclasses

from .tensor_plan import TensorPlan
from .tokens import TokenPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor holds the tokens of one stream along one dim: there it is cut into shards, or joined again.

    stream: "image" or "text"; each stream is cut by itself, so that every rank holds its part of both and
    the family's own code for telling them apart keeps working. A text that no block changes is no stream: every
    rank holds all of it.
    """

    stream: str
    dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """Attention over `streams`, in the order in which the module joins them.

    A mask, when the module passes one, covers the whole sequence of those streams in that order.
    num_calls: how often the module attends each time when it runs, which is once in a forward.
    """

    streams: tuple[str, ...]
    num_calls: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Where a diffusers model is cut over ranks and where it is joined.

    tokens: for all methods but PipeFusion, which cuts the rest of this way: outside of the blocks.
    Paths are those of `named_modules`; a `*` stands for one part of a path ("blocks.*.attn").
    cut_arguments: keyword arguments of the model's forward (a tensor or a list of tensors) → cut; absent
    and None ones are left alone.
    cut_outputs: modules whose output is cut.
    join_outputs: modules whose output is joined, so that what follows sees every token.
    attention: the attention modules whose keys are of cut streams; others attend to what they hold, as
    cross-attention to a text does.
    blocks: the lists of blocks, in the order in which they run; pipeline stages are cut from them.
    text_only, once: starts of the names of a block's weights that multiply text tokens alone, and of those
    that work once for each row; the others multiply every image token.
    streams: the arguments of a block that it returns, in its order; a lone one as it is, several as a tuple.
    The model calls blocks with them by keyword, or first and in this order.
    token_side: latent pixels on a side of an image token; the image stream begins with the latent's tokens,
    row by row.
    tensor: which weights are cut over the tensor axis.
    after_blocks: modules with weights that run after the last block, so on the last stage only.
    """

    tokens: TokenPlan
    cut_arguments: dict[str, Cut] = dataclasses.field(default_factory=dict)
    cut_outputs: dict[str, Cut] = dataclasses.field(default_factory=dict)
    join_outputs: dict[str, Cut]
    attention: dict[str, AttentionLayer]
    blocks: tuple[str, ...]
    text_only: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    tensor: TensorPlan
    streams: tuple[str, ...] = ("encoder_hidden_states", "hidden_states")
    token_side: int = 2
    after_blocks: tuple[str, ...] = ("norm_out", "proj_out")

    @property
    def streamless(self) -> tuple[str, ...]:
        """Starts of the names of a block's weights that multiply no stream's tokens."""
        return self.once if "encoder_hidden_states" in self.streams else (*self.once, *self.text_only)
