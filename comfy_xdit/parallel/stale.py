"""Attention of a segment to keys and values of the whole sequence, of which the other segments' are older.

A pipeline computes one segment of the tokens after the other (`segments.py`). Each layer keeps the keys and
values of all tokens; a segment puts its fresh ones in their places, then attends to everything. So a segment
sees those before it in the order of the step as they are now, those after it as they were a step ago.
Source: PipeFusion, arXiv 2405.14430.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .attention import Layer, Places, heads_for_sequence, heads_of_mask, sequence_for_heads
from .context import Axis, ParallelContext
from .sequence import shard_sizes, shard_starts


class StaleAttention:
    """`Attend` with buffers, for tokens spread over the ring and ulysses axes of `context`, or on one rank.

    The buffers hold each layer's keys and values in the order of its streams, whatever the degrees are: of
    the ulysses axis' ranks each has its own heads of all tokens; ranks of the ring axis send each other the
    fresh ones of the segment, as much as a ring sends, and hold all of them.
    Buffers live until `close`, which the end of a `with` calls. most_bytes_held: what they took at most.
    Collective over both axes.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._ring = context.axis("ring")
        self._ulysses = context.axis("ulysses")
        self._kept: dict[Hashable, dict[str, tuple[Tensor, Tensor]]] = {}
        self._run: Hashable = None
        self._keep = False
        self._first, self._num_rows = 0, 1
        self.most_bytes_held = 0

    def begin(self, run: Hashable, *, keep: bool, first: int, num_rows: int) -> None:
        """What follows computes rows that belong to `run`, from its `first` on; buffers are for all `num_rows`.

        A forward of all their tokens fills them if `keep`; those of segments need them filled.
        """
        self._run, self._keep = run, keep
        self._first, self._num_rows = first, num_rows

    def forget(self, run: Hashable) -> None:
        """No segment of `run` will be computed any more."""
        self._kept.pop(run, None)

    def close(self) -> None:
        self._kept.clear()

    def _bytes_held(self) -> int:
        return sum(x.nbytes for layers in self._kept.values() for pair in layers.values() for x in pair)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Layer, *, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        places = places_of(layer)
        if not sum(places.sizes):
            return q  # the segment has no token of this layer's streams, on any rank
        own = [places.sizes[rank] for rank in self._group(self._ring.index)]
        num_heads = q.shape[1]
        if self._ulysses.degree > 1:
            q, k, v = heads_for_sequence([q, k, v], own, self._ulysses)
        rings = [self._group(ring) for ring in range(self._ring.degree)]
        lengths = [sum(places.sizes[rank] for rank in group) for group in rings]
        k, v = gathered([k, v], lengths, self._ring)
        spans = [span for group in rings for rank in group for span in places.spans[rank]]
        k, v = self._renewed(k, v, layer, spans)
        if mask is not None:
            mask = heads_of_mask(mask, num_heads, self._ulysses)
            if mask.shape[2] > 1:
                mask = mask.index_select(2, places.tokens(rings[self._ring.index], q.device))
        out = kernels.attention(q, k, v, mask=mask, scale=scale)
        return sequence_for_heads(out, own, num_heads, self._ulysses) if self._ulysses.degree > 1 else out

    def _renewed(
        self, k: Tensor, v: Tensor, layer: Layer, spans: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """The run's whole buffers, with `k` and `v`, which come span after span, in their places."""
        pair = self._kept.get(self._run, {}).get(layer.path)
        first, num_rows = (self._first, self._num_rows) if pair is not None or self._keep else (0, k.shape[0])
        if pair is None:
            assert layer.spans is None, f"{layer.path}: nothing was kept of the other tokens"
            length = sum(layer.lengths)
            keys, values = (x.new_empty((num_rows, x.shape[1], length, x.shape[3])) for x in (k, v))
            pair = keys, values
            if self._keep:
                self._kept.setdefault(self._run, {})[layer.path] = pair
                self.most_bytes_held = max(self.most_bytes_held, self._bytes_held())
        keys, values = (whole[first : first + k.shape[0]] for whole in pair)
        for whole, fresh in ((keys, k), (values, v)):
            parts = fresh.split([size for _, size in spans], 2)
            for (start, size), part in zip(spans, parts, strict=True):
                whole.narrow(2, start, size).copy_(part)
        return keys, values

    def _group(self, ring: int) -> range:
        """Places on the sequence axis of the ranks that differ on the ulysses axis only."""
        first = ring * self._ulysses.degree
        return range(first, first + self._ulysses.degree)

    def __enter__(self) -> StaleAttention:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def places_of(layer: Layer) -> Places:
    """Where the tokens that each rank computes stand in the whole sequence."""
    spans: list[list[tuple[int, int]]] = [[] for _ in range(layer.num_shards)]
    computed = layer.spans or [(0, length) for length in layer.lengths]
    for begin, (first, number) in zip(shard_starts(list(layer.lengths)), computed, strict=True):
        sizes = shard_sizes(number, layer.num_shards)
        for rank, start in enumerate(shard_starts(sizes)):
            spans[rank].append((begin + first + start, sizes[rank]))
    return Places(spans=spans)


def gathered(tensors_BHLD: list[Tensor], lengths: list[int], axis: Axis) -> list[Tensor]:
    """Each tensor with the tokens of all ranks along dim 2, in one all-gather.

    lengths: the ranks' numbers of tokens. Collective: every rank on `axis` must call.
    """
    if axis.degree == 1:
        return tensors_BHLD
    per_token = sum(x.shape[0] * x.shape[1] * x.shape[3] for x in tensors_BHLD)
    sent = tensors_BHLD[0].new_zeros(max(lengths) * per_token)
    torch.cat([x.reshape(-1) for x in tensors_BHLD], out=sent[: lengths[axis.index] * per_token])
    received = sent.new_empty((axis.degree, sent.numel()))
    with axis.traffic.timed("all_gather", sent.nbytes * (axis.degree - 1), sent.device):
        dist.all_gather(list(received.unbind(0)), sent, group=axis.group)
    pieces = []
    for row, length in zip(received, lengths, strict=True):
        shapes = [(x.shape[0], x.shape[1], length, x.shape[3]) for x in tensors_BHLD]
        sizes = [math.prod(shape) for shape in shapes]
        parts = row[: sum(sizes)].split(sizes)
        pieces.append([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    return [torch.cat(parts, 2) for parts in zip(*pieces, strict=True)]
