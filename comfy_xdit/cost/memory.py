"""Bytes that a rank holds: weights to the byte where the file's dtype is kept, activations and buffers estimated."""

from __future__ import annotations

import dataclasses

from comfy_xdit.parallel.spec import ParallelSpec

from .arithmetic import Block, Network
from .formulas import key_bytes
from .work import RankShare, Work, part_of

LIVE_WIDTHS = 16
"""Hidden sizes that a token takes at a block's widest moment: the residual, its norm, queries, keys and values and
the rotated first two, attention's output, and an MLP of four widths before and after its activation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the worst moment. parameters: weights; activations: of the forward; buffers: the method's own."""

    parameters: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.activations + self.buffers


def memory(network: Network, work: Work, spec: ParallelSpec, rank: int) -> Memory:
    """What `rank` holds while it works."""
    part = part_of(network, work, spec, rank)
    return Memory(
        parameters=round(parameters(network, part) * network.param_bytes),
        activations=activations(network, work, part),
        buffers=exchanged(network, work, part) + kept_keys(network, work, part),
    )


def parameters(network: Network, part: RankShare) -> int:
    """Its stage's blocks, their matrices cut by the tensor axis; embedders are on every rank."""
    elsewhere = 0 if part.index["pipe"] + 1 == part.spec.pipe else network.last_params
    kinds = network.kinds(part.blocks).items()
    blocks = sum(count * _share(network.blocks[block], part.spec.tensor) for block, count in kinds)
    return network.outside.params - elsewhere + blocks


def activations(network: Network, work: Work, part: RankShare) -> int:
    """Of the tokens it runs at a time: its shard, and with pipe one patch of it (a whole step while warming up)."""
    tokens = part.shard_tokens(network.cut)
    return part.rows * tokens * network.hidden * work.element_bytes * LIVE_WIDTHS


def exchanged(network: Network, work: Work, part: RankShare) -> int:
    """What is on its way between ranks in one attention."""
    per_token, group = key_bytes(network, work, part), part.group_tokens(network.cut)
    total = 0
    if part.spec.ulysses > 1:
        # Sent and received at once: queries, keys and values, twice.
        total += 3 * per_token * group
    if part.spec.ring > 1 and part.spec.pipe == 1:
        # One block is attended to while the next one comes.
        total += 2 * per_token * group * part.spec.distri
    return total


def kept_keys(network: Network, work: Work, part: RankShare) -> int:
    """Keys and values that stale attention keeps from one evaluation to the next, to the byte."""
    spec, per_token = part.spec, key_bytes(network, work, part)
    layers = [streams for number in part.blocks for streams in network.blocks[number].attention]
    if spec.distri > 1:
        # What comes from every rank, and once more what goes to them.
        places = range(spec.distri)
        longest = (max(part.group_tokens(streams, distri=place) for place in places) for streams in layers)
        return per_token * sum(longest) * (spec.distri + 1)
    if spec.pipe > 1:
        # Of all tokens, wherever they are computed.
        return per_token * sum(sum(part.shards[stream]) for streams in layers for stream in streams)
    return 0


def _share(block: Block, degree: int) -> int:
    """The block's parameters on one rank of the tensor axis: matrices are cut, norms and biases taken as whole."""
    cut = sum(block.multiplied.values())
    return block.params - cut + cut // degree
