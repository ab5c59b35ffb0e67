"""How PipeFusion cuts sequences: everything once, in order, in pieces that ranks can share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_xdit.parallel.latent_tokens import Grid, LatentTokens
from comfy_xdit.parallel.patch_rows import LARGE, cut_rows, pixel_rows
from comfy_xdit.parallel.patch_tokens import PatchTokens

sizes = {"rows": st.integers(1, 40), "columns": st.integers(1, 12), "side": st.just(2)}
grids = st.builds(Grid, **sizes)
videos = st.builds(Grid, frames=st.integers(1, 3), **sizes)


@given(grid=videos, num_patches=st.integers(0, 60), num_stages=st.integers(1, 8), data=st.data())
def test_patches_are_all_rows_in_order(grid, num_patches, num_stages, data) -> None:
    num_shards = data.draw(st.integers(1, min(8, grid.num_tokens)))
    rows = cut_rows(grid, num_patches=num_patches, num_stages=num_stages, num_shards=num_shards)
    assert [row for patch in rows for row in patch] == list(range(grid.rows))
    sizes = [len(patch) for patch in rows]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) * grid.frames * grid.columns >= num_shards
    wanted = num_patches or num_stages + 1  # an image of fewer tokens than two large patches have
    assert len(rows) <= wanted
    if wanted <= grid.rows and grid.frames * grid.columns >= num_shards:
        assert len(rows) == wanted


@given(grid=grids, odd=st.booleans(), num_patches=st.integers(1, 9))
def test_pixels_are_all_rows_in_order(grid, odd, num_patches) -> None:
    height = 2 * grid.rows - odd
    assert Grid.of((height, 2 * grid.columns), 2) == grid
    assert Grid.of((3, height, 2 * grid.columns), 2).num_tokens == 3 * grid.num_tokens
    rows = cut_rows(grid, num_patches=num_patches, num_stages=1, num_shards=1)
    pixels = [pixel for patch in rows for pixel in range(height)[pixel_rows(grid, patch, height)]]
    assert pixels == list(range(height))


@given(
    grid=grids,
    num_patches=st.integers(1, 9),
    text=st.integers(1, 50),
    references=st.integers(0, 700),
    num_shards=st.integers(1, 8),
)
def test_patches_are_all_tokens(grid, num_patches, text, references, num_shards) -> None:
    """Of each stream; once, where there are enough of them."""
    if grid.num_tokens < num_shards:
        with pytest.raises(ValueError, match="beside a pipeline; use ring and ulysses of"):
            cut_rows(grid, num_patches=num_patches, num_stages=2, num_shards=num_shards)
        return
    rows = cut_rows(grid, num_patches=num_patches, num_stages=2, num_shards=num_shards)
    latent = LatentTokens(stream="image", grid=grid)
    patches = [PatchTokens(number=each, num=len(rows), rows=part, latent=latent) for each, part in enumerate(rows)]
    for stream, length in {"text": text, "image": grid.num_tokens + references}.items():
        runs = [patch.runs(stream, length, num_shards) for patch in patches]
        tokens = [token for own in runs for first, size in own for token in range(first, first + size)]
        assert set(tokens) == set(range(length))
        assert min(sum(size for _, size in own) for own in runs) >= min(num_shards, length)
        assert len(tokens) == length or length < num_shards * len(rows)


def test_the_number_of_patches_by_itself() -> None:
    """More than stages, up to two for each where they are still large, for the tokens that a rank computes."""

    def number(side: int, num_stages: int, num_shards: int = 1) -> int:
        grid = Grid(rows=side, columns=side, side=2)
        return len(cut_rows(grid, num_patches=0, num_stages=num_stages, num_shards=num_shards))

    assert 4 * LARGE == 64 * 64
    assert [number(64, stages) for stages in (2, 3, 4, 8)] == [4, 4, 5, 9]
    assert [number(64, 2, shards) for shards in (2, 4)] == [3, 3]
    assert [number(128, stages) for stages in (2, 8, 16)] == [4, 16, 17]
    assert len(cut_rows(Grid(rows=3, columns=9, side=2), num_patches=0, num_stages=4, num_shards=1)) == 3


def test_no_patches_at_all() -> None:
    with pytest.raises(ValueError, match="-1 patches are none; use 1 or more, or 0 to have the number chosen"):
        cut_rows(Grid(rows=8, columns=8, side=2), num_patches=-1, num_stages=2, num_shards=1)
