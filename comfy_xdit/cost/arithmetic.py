"""A transformer as numbers: its weights, its operations and its tokens, all read from a checkpoint's header."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from comfy_xdit.models import comfy_layout, detect
from comfy_xdit.parallel.spec import ModelShape
from comfy_xdit.weights.header import FLOATS, TensorInfo, read_header
from comfy_xdit.weights.quantised import layer_formats
from comfy_xdit.weights.slices import is_unused

ONCE, IMAGE, TEXT, BOTH = (), ("image",), ("text",), ("image", "text")

LAST = ("final_layer.linear.", "final_layer.adaLN_modulation.")
"""How the weights behind the blocks are named, in every family's layout."""

Streams = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What a family's weights work on.

    blocks: the lists of blocks in ComfyUI's layout, in the order in which they run.
    streams: start of a weight's name ("*" for the block's number) → the streams whose every token it
    multiplies; () is once for each row of the batch. The first that fits counts.
    attention: part of a name → streams of one attention in the blocks that have a weight so named.
    crossing: the same, of attentions whose keys are another stream's that every rank has whole: queries', keys'.
    cut: the streams that ranks cut and blocks hand on; of others every rank has all.
    sums: part of a name → streams whose every token is added up over the ranks, once for each weight so named.
    text_tokens: of a usual prompt. packing: latent pixels on a side that are packed into a token's channels
    beside the model's own patches. halved: half of what comes out is a variance, which stays where it is made.
    """

    blocks: tuple[str, ...]
    streams: Mapping[str, Streams]
    attention: Mapping[str, Streams]
    sums: Mapping[str, Streams]
    text_tokens: int
    crossing: Mapping[str, tuple[Streams, Streams]] = dataclasses.field(default_factory=dict)
    cut: Streams = BOTH
    packing: int = 1
    halved: bool = False


ANATOMIES: dict[str, Anatomy] = {
    "flux": Anatomy(
        blocks=("double_blocks", "single_blocks"),
        streams={
            "img_in.": IMAGE,
            "txt_in.": TEXT,
            "double_blocks.*.img_mod.": ONCE,
            "double_blocks.*.img_": IMAGE,
            "double_blocks.*.txt_mod.": ONCE,
            "double_blocks.*.txt_": TEXT,
            "single_blocks.*.modulation.": ONCE,
            "single_blocks.*.linear": BOTH,
            "final_layer.linear.": IMAGE,
        },
        attention={".img_attn.qkv.weight": BOTH, ".linear1.weight": BOTH},
        sums={
            ".img_attn.proj.weight": IMAGE,
            ".txt_attn.proj.weight": TEXT,
            ".img_mlp.2.weight": IMAGE,
            ".txt_mlp.2.weight": TEXT,
            ".linear2.weight": BOTH,
        },
        text_tokens=256,
        packing=2,
    ),
    "sd3": Anatomy(
        blocks=("joint_blocks",),
        streams={
            "x_embedder.": IMAGE,
            "context_embedder.": TEXT,
            "joint_blocks.*.x_block.adaLN_modulation.": ONCE,
            "joint_blocks.*.x_block.": IMAGE,
            "joint_blocks.*.context_block.adaLN_modulation.": ONCE,
            "joint_blocks.*.context_block.": TEXT,
            "final_layer.linear.": IMAGE,
        },
        attention={".x_block.attn.qkv.weight": BOTH, ".x_block.attn2.qkv.weight": IMAGE},
        sums={
            ".x_block.attn.proj.weight": IMAGE,
            ".x_block.attn2.proj.weight": IMAGE,
            ".context_block.attn.proj.weight": TEXT,
            ".x_block.mlp.fc2.weight": IMAGE,
            ".context_block.mlp.fc2.weight": TEXT,
        },
        text_tokens=154,
    ),
    "pixart": Anatomy(
        blocks=("blocks",),
        streams={
            "x_embedder.": IMAGE,
            "y_embedder.": TEXT,
            "blocks.*.cross_attn.kv_linear.": TEXT,
            "blocks.*.": IMAGE,
            "final_layer.linear.": IMAGE,
        },
        attention={".attn.qkv.weight": IMAGE},
        crossing={".cross_attn.q_linear.weight": (IMAGE, TEXT)},
        cut=IMAGE,
        sums={".attn.proj.weight": IMAGE, ".cross_attn.proj.weight": IMAGE, ".mlp.fc2.weight": IMAGE},
        text_tokens=40,  # ComfyUI does not pad its prompts
        halved=True,
    ),
}
"""By the family's name; a family without an entry runs, but cannot be planned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block, or all that is outside of the blocks.

    params: all of its weights. multiplied: streams → the elements of the matrices that multiply each of
    their tokens. attention, crossing: the streams of each of its attentions. sums: those that tensor parallel
    adds up.
    once_outputs: numbers that come out of the matrices that run once for each row.
    norms: the streams of norms over all heads, for which ranks of tensor add up a number a token.
    """

    params: int
    multiplied: Mapping[Streams, int]
    attention: tuple[Streams, ...] = ()
    crossing: tuple[tuple[Streams, Streams], ...] = ()
    sums: tuple[Streams, ...] = ()
    once_outputs: int = 0
    norms: tuple[Streams, ...] = ()

    def linear_flops(self, tokens: Mapping[str, int]) -> int:
        """Operations of its matrices for one row of the batch with so many tokens of each stream."""
        return sum(
            2 * elements * (sum(tokens[stream] for stream in streams) if streams else 1)
            for streams, elements in self.multiplied.items()
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """What the cost of a transformer depends on. Equal to itself only, so that it can be a key.

    blocks: in the order in which they run; outside: embedders and final layer; last_params: of these, what is on
    the last stage only. cut: as in `Anatomy`.
    latent_patch: latent pixels on a side of one token, and latent_frames of a video's in it; latent_pixel: image pixels
    on a side of one latent pixel.
    token_outputs: numbers that ranks join for each image token; latent_outputs: of use, for each latent pixel.
    param_bytes: of one parameter as the file keeps it, on average.
    guided: takes guidance as a number, so that one evaluation a step is usual.
    """

    title: str
    shape: ModelShape
    hidden: int
    blocks: tuple[Block, ...]
    outside: Block
    last_params: int
    cut: Streams
    latent_patch: int
    token_outputs: int
    latent_outputs: int
    param_bytes: float
    text_tokens: int
    guided: bool
    latent_pixel: int = 8
    latent_frames: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden // self.shape.num_heads

    @property
    def params(self) -> int:
        return self.outside.params + sum(block.params for block in self.blocks)

    @property
    def num_attentions(self) -> int:
        return sum(len(block.attention) for block in self.blocks)

    def kinds(self, blocks: Iterable[int]) -> Counter[int]:
        """Of these blocks those that differ, each as the first one like it, and how many of it there are.

        A large model has two or three kinds of blocks, and what costs depend on is alike in all of a kind.
        """
        return Counter(self.first_alike[block] for block in blocks)

    @functools.cached_property
    def first_alike(self) -> list[int]:
        """Of each block the number of the first one like it."""
        return [self.blocks.index(block) for block in self.blocks]

    def flops(self, tokens: Mapping[str, int]) -> int:
        """Operations of one evaluation of one row: matrices and attention; what is elementwise isn't counted."""
        return sum(
            part.linear_flops(tokens)
            + sum(attention_flops(streams, streams, tokens, self.hidden) for streams in part.attention)
            + sum(attention_flops(*streams, tokens, self.hidden) for streams in part.crossing)
            for part in (self.outside, *self.blocks)
        )


def attention_flops(queries: Streams, keys: Streams, tokens: Mapping[str, int], hidden: int) -> int:
    """Queries with keys, and weights with values: two products of 2 · Q · K · hidden operations."""
    return 4 * sum(tokens[stream] for stream in queries) * sum(tokens[stream] for stream in keys) * hidden


def read_network(path: str) -> Network:
    """The network in a checkpoint; only the file's header is read.

    Raises ValueError for files that the project cannot run, and for families without an entry in `ANATOMIES`.
    """
    infos = read_header(path)
    family, prefix = detect(infos, layer_formats(path, infos))
    own = {key.removeprefix(prefix): info for key, info in infos.items() if key.startswith(prefix)}
    table = family.table(own)
    used = [info for key, info in own.items() if not is_unused(table, key)]
    if family.name not in ANATOMIES:
        raise ValueError(f"{family.title} has no cost model; choose degrees by measuring")
    layout, _ = comfy_layout(family, own)
    config = family.config(layout)
    weights = {key: info for key, info in layout.items() if not is_unused(table, key)}
    return network(ANATOMIES[family.name], weights, config, family.shape(config), bytes_of(used))


def bytes_of(infos: Iterable[TensorInfo]) -> int:
    """Of all the tensors that are numbers a model computes with."""
    return sum(info.end - info.begin for info in infos if info.dtype in FLOATS)


def network(
    anatomy: Anatomy, weights: Mapping[str, Any], config: Mapping[str, Any], shape: ModelShape, num_bytes: int
) -> Network:
    """The network with these weights, by their names in ComfyUI's layout; values have a `shape`."""
    by_place: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    for key, info in weights.items():
        parts = key.split(".", 2)
        place = (parts[0], int(parts[1])) if parts[0] in anatomy.blocks else ("", 0)
        by_place.setdefault(place, {})[key] = tuple(info.shape)
    outside = _part(anatomy, by_place.pop(("", 0)))
    order = sorted(by_place, key=lambda place: (anatomy.blocks.index(place[0]), place[1]))
    blocks = tuple(_part(anatomy, by_place[place]) for place in order)
    params = outside.params + sum(block.params for block in blocks)
    patch, latent_patch = config["patch_size"], config["patch_size"] * anatomy.packing
    token_outputs = config["out_channels"] * patch**2
    return Network(
        title=shape.title,
        shape=shape,
        hidden=config["num_attention_heads"] * config["attention_head_dim"],
        blocks=blocks,
        outside=outside,
        last_params=sum(math.prod(info.shape) for key, info in weights.items() if key.startswith(LAST)),
        cut=anatomy.cut,
        latent_patch=latent_patch,
        token_outputs=token_outputs,
        latent_outputs=token_outputs // latent_patch**2 // (2 if anatomy.halved else 1),
        param_bytes=num_bytes / params,
        text_tokens=anatomy.text_tokens,
        guided=bool(config.get("guidance_embeds", False)),
    )


def _part(anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> Block:
    multiplied: dict[Streams, int] = {}
    attention: list[Streams] = []
    crossing: list[tuple[Streams, Streams]] = []
    sums: list[Streams] = []
    once_outputs = 0
    for key, shape in shapes.items():
        attention += [streams for name, streams in anatomy.attention.items() if name in key]
        crossing += [streams for name, streams in anatomy.crossing.items() if name in key]
        sums += [streams for name, streams in anatomy.sums.items() if name in key]
        # Matrices, and the kernel of a convolution whose steps are as long as it is wide.
        if key.endswith(".weight") and len(shape) in (2, 4):
            streams = _streams(anatomy, key)
            multiplied[streams] = multiplied.get(streams, 0) + math.prod(shape)
            once_outputs += 0 if streams else shape[0]
    return Block(
        params=sum(math.prod(shape) for shape in shapes.values()),
        multiplied=multiplied,
        attention=tuple(attention),
        crossing=tuple(crossing),
        sums=tuple(sums),
        once_outputs=once_outputs,
    )


def _streams(anatomy: Anatomy, key: str) -> Streams:
    parts = key.split(".")
    if parts[0] in anatomy.blocks:
        parts[1] = "*"
    name = ".".join(parts)
    return next((streams for start, streams in anatomy.streams.items() if name.startswith(start)), ONCE)
