"""How PipeFusion cuts a latent into patches: some rows of tokens each, so that its part of it is some rows of pixels.

Source: PipeFusion, arXiv 2405.14430.
"""

from __future__ import annotations

from comfy_xdit.errors import InputError

from .latent_tokens import Grid
from .sequence import shard_sizes, shard_starts

LARGE = 1024
"""Tokens of a patch from which on larger ones aren't faster, by the token."""


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


def pixel_rows(grid: Grid, rows: range, height: int) -> slice:
    """The rows of a latent of `height` that these rows of tokens cover."""
    return slice(rows.start * grid.side, min(rows.stop * grid.side, height))
