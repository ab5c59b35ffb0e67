"""Where the tokens of a latent stand in a model's streams."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A latent's tokens, frame after frame, row by row. side: latent pixels on a side of one."""

    frames: int = 1
    rows: int
    columns: int
    side: int

    @classmethod
    def of(cls, sizes: Sequence[int], side: int) -> Grid:
        """The grid of a latent of frames (none or several dims), height and width, one token deep.

        Tokens at its end may be in part beyond it.
        """
        *frames, height, width = sizes
        rows, columns = (-(-length // side) for length in (height, width))
        return cls(frames=math.prod(frames), rows=rows, columns=columns, side=side)

    @property
    def num_tokens(self) -> int:
        return self.frames * self.rows * self.columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSizes:
    """Stream → its tokens, of all that a model's blocks give; of how many numbers one token is."""

    lengths: dict[str, int]
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentTokens:
    """Where a latent's tokens stand: in `stream`, from its token `first` on, in the grid's order."""

    stream: str
    first: int = 0
    grid: Grid

    @classmethod
    def of(cls, x: Tensor, stream: str, *, side: int, first: int = 0) -> LatentTokens:
        """Of a latent [batch, channels, …, height, width]; side: latent pixels on a side of a token."""
        return cls(stream=stream, first=first, grid=Grid.of(x.shape[2:], side))
