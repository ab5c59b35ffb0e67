"""How PipeFusion cuts a sequence: what conditions the image in pieces of their own, the image in patches.

A patch is some rows of image tokens, so that its part of the latent is some rows of pixels. Text, where it is a
stream, and the tokens of reference images need nothing of the sampler and come first in each step.
Source: PipeFusion, arXiv 2405.14430; there text goes with every patch.
"""

from __future__ import annotations

import dataclasses

from comfy_xdit.errors import InputError

from .latent_tokens import Grid
from .sequence import shard_sizes, shard_starts

Spans = dict[str, tuple[int, int]]
"""Stream → its first token, and how many."""

LARGE = 1024
"""Tokens of a patch from which on larger ones aren't faster, by the token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that a stage computes at once. spans: None for all. patch: its number, None for what conditions."""

    spans: Spans | None
    patch: int | None = None


WHOLE = Segment(spans=None)


def cut_rows(grid: Grid, *, num_patches: int, num_stages: int, num_shards: int) -> list[range]:
    """Rows of tokens of each patch, in all frames: of equal height, the first ones one row higher where they can't be.

    num_patches: 0 makes `usual_patches`. Fewer are made when there are too few rows, or rows of too few tokens to
    give one to each of `num_shards` ranks. Raises InputError when there are too few for a single patch.
    """
    if num_patches < 0:
        raise InputError(f"{num_patches} patches are none; use 1 or more, or 0 to have the number chosen")
    if grid.num_tokens < num_shards:
        raise InputError(
            f"an image of {grid.num_tokens} tokens cannot be cut over {num_shards} ranks beside a pipeline; "
            f"use ring and ulysses of {grid.num_tokens} or less together"
        )
    limit = grid.rows // -(-num_shards // (grid.frames * grid.columns))
    wanted = num_patches or usual_patches(grid.num_tokens // num_shards, num_stages)
    sizes = shard_sizes(grid.rows, min(wanted, limit))
    return [range(start, start + size) for start, size in zip(shard_starts(sizes), sizes, strict=True)]


def usual_patches(num_tokens: int, num_stages: int) -> int:
    """How many patches for an image of which each rank computes `num_tokens`, when nobody says.

    One more than stages at least: as many as stages are computed at any time, while another is on its way back. At
    most two for each stage, and only as far as they are `LARGE`: small matrices are slow, and fewer patches are
    nearer to the exact result.
    """
    return min(max(num_tokens // LARGE, num_stages + 1), 2 * num_stages)


def segments_of(grid: Grid, patches: list[range], lengths: dict[str, int], *, num_shards: int) -> list[Segment]:
    """The segments of one step in order: text, references in pieces like patches, patches.

    lengths: tokens of the streams; no "text" where blocks don't change it. What "image" has beyond the grid are
    references.
    Raises InputError when the text cannot be cut over `num_shards` ranks.
    """
    num_patch_tokens, text = grid.num_tokens, lengths.get("text", 0)
    references = lengths["image"] - num_patch_tokens
    pieces = references // max(len(patches[0]) * grid.columns, num_shards)
    conditions: list[Spans] = [{"text": (0, text), "image": (num_patch_tokens, 0)}]
    if references and not pieces:
        conditions = [{"text": (0, text), "image": (num_patch_tokens, references)}]
    sizes = shard_sizes(references, pieces) if pieces else []
    for start, size in zip(shard_starts(sizes), sizes, strict=True):
        conditions.append({"text": (0, 0), "image": (num_patch_tokens + start, size)})
    found = [Segment(spans=spans) for spans in conditions if num_tokens(spans)]
    if found and num_tokens(found[0].spans or {}) < num_shards:
        raise InputError(
            f"a text of {text} tokens cannot be cut over {num_shards} ranks beside a pipeline; "
            f"use ring and ulysses of {max(text, 1)} or less together"
        )
    for number, rows in enumerate(patches):
        span = (rows.start * grid.columns, len(rows) * grid.columns)
        found.append(Segment(spans={"text": (0, 0), "image": span}, patch=number))
    return found


def num_tokens(spans: Spans) -> int:
    return sum(size for _, size in spans.values())


def pixel_rows(grid: Grid, rows: range, height: int) -> slice:
    """The rows of a latent of `height` that these rows of tokens cover."""
    return slice(rows.start * grid.side, min(rows.stop * grid.side, height))
