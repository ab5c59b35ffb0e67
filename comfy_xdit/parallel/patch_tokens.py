"""Which tokens one patch of a latent is made of, on whole-shaped shards: some of each stream.

A patch is some rows of the latent, in all of its frames, and as large a part of everything else: of the text, of
reference images. So patches are alike, and none waits for another's text. A stream of too few tokens is computed more
often: every rank has a token of each stream in each patch, as models' code needs.
Source: PipeFusion, arXiv 2405.14430; there text goes with every patch.
"""

from __future__ import annotations

import dataclasses

from .latent_tokens import LatentTokens
from .sequence import Runs, shard_sizes, shard_starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchTokens:
    """The tokens of patch `number` of `num`. rows: of the latent's tokens."""

    number: int
    num: int
    rows: range
    latent: LatentTokens

    def runs(self, stream: str, length: int, least: int) -> Runs:
        """Those of a stream of `length`, at least `least` if it has so many.

        Raises ValueError where the latent's tokens are not all there.
        """
        if stream != self.latent.stream:
            return (self._share(length, least),)
        latent, grid = self.latent, self.latent.grid
        frame, end = grid.rows * grid.columns, latent.first + grid.num_tokens
        if end > length:
            raise ValueError(f"{length} tokens of {stream} do not hold the latent's, which end at {end}")
        size = len(self.rows) * grid.columns
        places = range(latent.first + self.rows.start * grid.columns, end, frame)
        first_after, num_after = self._share(length - end, 0)
        runs = [self._share(latent.first, 0), *((place, size) for place in places), (end + first_after, num_after)]
        return tuple(run for run in runs if run[1])

    def _share(self, length: int, least: int) -> tuple[int, int]:
        return shared_run(length, self.number, self.num, least)


def shared_run(length: int, number: int, num: int, least: int) -> tuple[int, int]:
    """Of `length` tokens the run (first, number) of patch `number` of `num`: even shares, or, where these had less than
    `least` tokens, runs that overlap.
    """
    if length >= num * least:
        sizes = shard_sizes(length, num)
        return shard_starts(sizes)[number], sizes[number]
    size = min(least, length)
    return number * (length - size) // max(num - 1, 1), size
