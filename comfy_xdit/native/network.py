"""What the cost model knows of a model of ComfyUI's own class: from its family's plan and its layers' sizes alone.

Streams of the plan are counted as two: "image", what a latent's size tells of, and "text", the rest, of which a usual
length is known. So a sound beside a video counts as text: both are short.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from comfy_xdit.cost.arithmetic import ONCE, TEXT, Block, Network, Streams
from comfy_xdit.parallel.paths import find
from comfy_xdit.parallel.spec import ModelShape
from comfy_xdit.parallel.stages import block_paths, stream_width, weights_of
from comfy_xdit.parallel.tensor_plan import TensorPlan
from comfy_xdit.parallel.tokens import Blocks, TokenPlan

from .family import ComfyFamily

COUNTED = {"image": ("image",), "video": ("image",), "all": ("image", "text")}
"""What streams are made of; those of other names are text."""


def network_of(
    family: ComfyFamily, transformer: nn.Module, shape: ModelShape, *, latent_channels: int, kept_bytes: int
) -> Network:
    """The network of a transformer, whose weights need not be there.

    shape: as of `ComfyFamily.shape`. kept_bytes: of all its weights, as workers keep them.
    """
    plan = family.plan
    frames, height, width = family.patch(transformer)
    assert height == width, "patches are squares"
    paths = block_paths(transformer, plan)
    blocks = [_block(transformer, plan, path) for path in paths]
    inside = tuple(f"{path}." for path in paths)
    weights = weights_of(transformer)
    outside = [weight for weight in weights if not weight[0].startswith(inside)]
    hidden = max(stream_width(transformer.get_submodule(path), _rule(plan, path)) for path in paths)
    return Network(
        title=shape.title,
        shape=shape,
        hidden=hidden,
        blocks=tuple(blocks),
        outside=Block(
            params=sum(elements for _, elements, _ in outside),
            multiplied={ONCE: sum(elements for _, elements, width in outside if width)},
        ),
        # Every stage has all that is outside of blocks.
        last_params=0,
        cut=_counted(stream for blocks in plan.blocks for _, rule in blocks.given for stream in rule.streams),
        latent_patch=height,
        latent_frames=frames,
        # What the last block gives is joined, not what is made of it.
        token_outputs=hidden,
        latent_outputs=latent_channels,
        param_bytes=kept_bytes / sum(elements for _, elements, _ in weights),
        text_tokens=family.text_tokens,
        guided=False,
    )


def _counted(streams: Iterable[str]) -> Streams:
    found = {kind for stream in streams for kind in COUNTED.get(stream, TEXT)}
    return tuple(kind for kind in ("image", "text") if kind in found)


def _block(transformer: nn.Module, plan: TokenPlan, path: str) -> Block:
    rule = _rule(plan, path)
    block, given = transformer.get_submodule(path), _given(rule)
    weights = weights_of(block)
    multiplied: dict[Streams, int] = {}
    for name, elements, width in weights:
        if width:
            streams = _multiplies(rule, name, given)
            multiplied[streams] = multiplied.get(streams, 0) + elements
    attending = [plan.attention[pattern] for pattern, _, _ in _within(block, rule, plan.attention)]
    own = [each for each in attending if each.keys is None]
    lines = plan.tensor or TensorPlan(columns=(), rows={})
    return Block(
        params=sum(elements for _, elements, _ in weights),
        multiplied=multiplied,
        attention=tuple(
            _counted(streams) for each in own for streams in (each.streams, *(() if each.or_fewer else each.then))
        ),
        crossing=(
            *((_counted(each.streams), _counted(each.keys)) for each in attending if each.keys is not None),
            *((given, TEXT) for _ in _attending_to_text(rule, weights)),
        ),
        sums=tuple(_multiplies(rule, name, given) for _, name, _ in _within(block, rule, lines.rows)),
        norms=tuple(given for _, _, layer in _within(block, rule, lines.norms) if isinstance(layer, nn.RMSNorm)),
        once_outputs=sum(getattr(layer, "out_features", 0) for _, _, layer in _within(block, rule, lines.joined)),
    )


def _rule(plan: TokenPlan, path: str) -> Blocks:
    return next(blocks for blocks in plan.blocks if blocks.path == path.rpartition(".")[0])


def _given(rule: Blocks) -> Streams:
    """What a weight of a block multiplies that nothing is said of: a block of two streams has names for the text's."""
    streams = _counted(stream for _, tokens in rule.given for stream in tokens.streams)
    apart = len(rule.given) > 1 and rule.light
    return tuple(stream for stream in streams if stream not in TEXT) if apart else streams


def _multiplies(rule: Blocks, name: str, given: Streams) -> Streams:
    return ONCE if name.startswith(rule.once) else TEXT if name.startswith(rule.light) else given


def _attending_to_text(rule: Blocks, weights: list[tuple[str, int, int]]) -> set[str]:
    """The modules that attend to a text that no block changes: all that have weights of it."""
    if "text" in _counted(stream for _, tokens in rule.given for stream in tokens.streams):
        return set()
    return {name.split(".")[0] for name, _, _ in weights if name.startswith(rule.light)}


def _within(block: nn.Module, rule: Blocks, patterns: Iterable[str]) -> list[tuple[str, str, nn.Module]]:
    """(pattern, path in the block, module) of those patterns that are in the block, or the block itself."""
    start = f"{rule.path}.*"
    found = [(pattern, "", block) for pattern in patterns if pattern == start]
    inner = [(pattern, pattern.removeprefix(f"{start}.")) for pattern in patterns if pattern.startswith(f"{start}.")]
    return found + [(pattern, f"{path}.", layer) for pattern, rest in inner for path, layer in find(block, rest)]
