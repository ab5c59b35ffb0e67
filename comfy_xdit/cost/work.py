"""What is asked for, and where one rank of a spec stands in it: rows, tokens, heads and blocks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

from comfy_xdit.parallel.sequence import shard_sizes
from comfy_xdit.parallel.spec import AXES, BALANCES, ParallelSpec
from comfy_xdit.parallel.stages import cost_of, stages

from .arithmetic import TEXT, Block, Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One evaluation of a network: `images` pictures at a time, `chunks` of each (cond, uncond).

    latent: its height and width, and how many frames it has; element_bytes: of the dtype that is computed in.
    num_evaluations: in the whole job, of which `warmup` are exact with methods that reuse activations.
    num_patches: of PipeFusion; 0 lets the engine choose. balance: what its stages have alike, one of `BALANCES`.
    """

    latent: tuple[int, int]
    text_tokens: int
    images: int = 1
    chunks: int = 1
    element_bytes: int = 2
    num_evaluations: int = 28
    warmup: int = 1
    num_patches: int = 0
    balance: str = BALANCES[0]
    frames: int = 1

    @property
    def rows(self) -> int:
        return self.images * self.chunks

    def tokens(self, network: Network) -> dict[str, int]:
        """Of each stream."""
        image = math.prod(-(-side // network.latent_patch) for side in self.latent)
        return {"image": image * -(-self.frames // network.latent_frames), "text": self.text_tokens}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank has of the work.

    rows: of the batch. shards: stream → how many of its tokens each rank of its sequence axis has.
    shard: which of these is its own. heads: of each rank on its ulysses axis, after tensor parallel.
    blocks: the run of blocks of its stage. index: axis → place.
    """

    spec: ParallelSpec
    index: Mapping[str, int]
    rows: int
    shards: Mapping[str, list[int]]
    shard: int
    heads: list[int]
    blocks: range

    @property
    def own_heads(self) -> int:
        return self.heads[self.index["ulysses"]]

    def shard_tokens(self, streams: tuple[str, ...], shard: int | None = None) -> int:
        """Tokens of `streams` that this rank, or another of its sequence axis, holds."""
        place = self.shard if shard is None else shard
        return sum(self.shards[stream][place] for stream in streams)

    def group_tokens(self, streams: tuple[str, ...], distri: int | None = None, ring: int | None = None) -> int:
        """Tokens that the ulysses ranks of a place on the distri and ring axes hold together; by default the own."""
        distri = self.index["distri"] if distri is None else distri
        ring = self.index["ring"] if ring is None else ring
        first = (distri * self.spec.ring + ring) * self.spec.ulysses
        return sum(self.shard_tokens(streams, first + i) for i in range(self.spec.ulysses))


def part_of(
    network: Network, work: Work, spec: ParallelSpec, rank: int, tokens: Mapping[str, int] | None = None
) -> RankShare:
    """Rank `rank`'s part. tokens: of each stream, where not all of the work's are meant."""
    left, index = rank, {}
    for axis in reversed(AXES):
        left, index[axis] = divmod(left, getattr(spec, axis))
    degree = spec.distri * spec.ring * spec.ulysses
    whole = tokens or work.tokens(network)
    every = range(len(network.blocks))
    return RankShare(
        spec=spec,
        index=index,
        rows=shard_sizes(shard_sizes(work.rows, spec.cfg)[index["cfg"]], spec.dp)[index["dp"]],
        shards={
            stream: shard_sizes(length, degree) if stream in network.cut else [length] * degree
            for stream, length in whole.items()
        },
        shard=(index["distri"] * spec.ring + index["ring"]) * spec.ulysses + index["ulysses"],
        heads=shard_sizes(network.shape.num_heads // spec.tensor, spec.ulysses),
        blocks=every if spec.pipe == 1 else _stages(_costs(network, work.balance), spec.pipe)[index["pipe"]],
    )


def _costs(network: Network, balance: str) -> tuple[int, ...]:
    """Of every block, what stages are to have alike."""
    costs: list[int] = []
    for number, first in enumerate(network.first_alike):
        costs.append(_cost(network.blocks[number], network.hidden, balance) if number == first else costs[first])
    return tuple(costs)


def _cost(block: Block, hidden: int, balance: str) -> int:
    """As `stages.block_costs`, from the header."""
    if balance == "memory":
        return block.params
    image = sum(elements for streams, elements in block.multiplied.items() if "image" in streams)
    return cost_of(image, block.multiplied.get(TEXT, 0), hidden=hidden)


@functools.lru_cache(maxsize=64)
def _stages(costs: tuple[int, ...], num_stages: int) -> list[range]:
    return stages(costs, num_stages)
