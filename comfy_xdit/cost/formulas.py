"""Bytes that a rank sends in one evaluation, as our engine moves them: to the byte, for every spec it runs exactly.

An all-gather of n bytes among N ranks counts (N - 1) · n on each, an all-reduce 2 · (N - 1) / N · n, as their ring
algorithms send; an all-to-all counts what is for other ranks.
"""

from __future__ import annotations

from collections import Counter

from comfy_xdit.parallel.spec import ParallelSpec

from .arithmetic import Network
from .work import RankShare, Work, part_of

SQUARES_BYTES = 4
"""Of a sum of squares, for which ranks compute in fp32 at least."""


def sent(network: Network, work: Work, spec: ParallelSpec, rank: int) -> Counter[str]:
    """Bytes that leave `rank` in one exact evaluation, by collective."""
    part = part_of(network, work, spec, rank)
    total: Counter[str] = Counter()
    if part.rows:
        for block, count in network.kinds(part.blocks).items():
            once = tensor(network, work, part, block)
            for streams in network.blocks[block].attention:
                once += ulysses(network, work, part, streams)
                once += distri(network, work, part, streams)
                once += ring(network, work, part, streams)
            total += Counter({name: count * number for name, number in once.items()})
        total += joined(network, work, part)
    total += shared(network, work, part)
    return total


def ulysses(network: Network, work: Work, part: RankShare, streams: tuple[str, ...]) -> Counter[str]:
    """Two all-to-alls around an attention: queries, keys and values to their heads' ranks, and outputs back.

    Of 4 tensors of L tokens and H heads, all goes but what is the rank's own: with even shards 4 · p · hs / N ·
    (N - 1) / N elements, where p is all tokens.
    """
    if part.spec.ulysses == 1:
        return Counter()
    own, together = part.shard_tokens(streams), part.group_tokens(streams)
    per_token = part.rows * network.head_dim * work.element_bytes
    others = sum(part.heads) - part.own_heads
    return Counter(all_to_all=per_token * (3 * own * others + part.own_heads * (together - own)))


def distri(network: Network, work: Work, part: RankShare, streams: tuple[str, ...]) -> Counter[str]:
    """A rank's keys and values to all others, padded to the longest shard: 2 · p · hs · (N - 1) / N elements.

    The last evaluation sends nothing, unless it is exact: nobody would use it.
    """
    degree = part.spec.distri
    if degree == 1:
        return Counter()
    longest = max(part.group_tokens(streams, distri=place) for place in range(degree))
    return Counter(all_gather=key_bytes(network, work, part) * longest * (degree - 1))


def ring(network: Network, work: Work, part: RankShare, streams: tuple[str, ...]) -> Counter[str]:
    """Keys and values of every ring rank but the next one's pass through: 2 · p · hs · (N - 1) / N elements."""
    degree, own = part.spec.ring, part.index["ring"]
    passed = sum(
        part.group_tokens(streams, distri=place, ring=(own - step) % degree)
        for step in range(degree - 1)
        for place in range(part.spec.distri)
    )
    return Counter(send=key_bytes(network, work, part) * passed) if passed else Counter()


def tensor(network: Network, work: Work, part: RankShare, block: int) -> Counter[str]:
    """An all-reduce of the hidden tokens for each matrix cut by rows: 4 · p · hs · (N - 1) / N elements where
    a block has two (attention's output and the MLP's), half of it where it has one. Beside it modulations, a few
    numbers a row, are gathered.
    """
    degree = part.spec.tensor
    if degree == 1:
        return Counter()
    per_token = part.rows * network.hidden * work.element_bytes
    sums = [per_token * part.shard_tokens(streams) for streams in network.blocks[block].sums]
    squares = part.rows * max(work.element_bytes, SQUARES_BYTES)
    sums += [squares * part.shard_tokens(streams) for streams in network.blocks[block].norms]
    gathered = part.rows * network.blocks[block].once_outputs // degree * work.element_bytes * (degree - 1)
    return Counter(
        all_reduce=sum(2 * (degree - 1) * num_bytes // degree for num_bytes in sums), all_gather=gathered
    )


def joined(network: Network, work: Work, part: RankShare) -> Counter[str]:
    """The output's tokens, joined once after the last block; shards are padded to the longest."""
    sizes = part.shards["image"]
    per_token = part.rows * network.token_outputs * work.element_bytes
    return Counter(all_gather=per_token * max(sizes) * (len(sizes) - 1)) if len(sizes) > 1 else Counter()


def shared(network: Network, work: Work, part: RankShare, *, height: int | None = None) -> Counter[str]:
    """The lanes' outputs (cfg and dp), each padded to the lane with the most rows.

    height: of the latent's patch that is shared; the whole latent's by default.
    """
    lanes = part.spec.cfg * part.spec.dp
    if lanes == 1:
        return Counter()
    most = part_of(network, work, part.spec, 0).rows
    whole, width = work.latent
    pixels = work.frames * (whole if height is None else height) * width
    row = pixels * network.latent_outputs * work.element_bytes
    return Counter(all_gather=most * row * (lanes - 1))


def key_bytes(network: Network, work: Work, part: RankShare) -> int:
    """Of one token's keys and values in one layer, for the heads of this rank."""
    return 2 * part.rows * part.own_heads * network.head_dim * work.element_bytes
