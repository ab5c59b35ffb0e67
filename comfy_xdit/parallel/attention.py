"""Exact attention over tokens that are spread over ranks: Ulysses, ring, and both at once.

Shape suffixes: B batch, H heads, h this rank's share of them, S sequence, L its share of it, D head dim.
Tokens are cut over distri times ring times ulysses ranks, the first outermost: Ulysses (all-to-all) makes a
ring rank's tokens whole and cuts heads instead, keys and values of the distri axis' ranks join, and then go
round the ring.
Sources: DeepSpeed-Ulysses, arXiv 2309.14509; Ring Attention, arXiv 2310.01889; both, arXiv 2405.07719.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import kernels
from .context import Axis, ParallelContext
from .distri import DistriKeys
from .sequence import exchange, shard_sizes, shard_starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """An attention module in a forward: its path, and the whole lengths of its streams in order.

    num_shards: over how many ranks the tokens are cut; 1 where there are too few, and every rank holds all.
    spans: the tokens of each stream that the forward computes, (first, number); None for all.
    """

    path: str
    lengths: tuple[int, ...]
    num_shards: int
    spans: tuple[tuple[int, int], ...] | None = None


class Attend(Protocol):
    """Attention as a parallel method does it; the one seam between models and methods.

    q, k, v: [B, H, L, D], this rank's tokens, stream after stream.
    mask: over the whole sequence, [B or 1, H or 1, S or 1, S], bool (True = seen) or additive.
    Returns [B, H, L, D]. Collective over the method's axes.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Layer, *, mask: Tensor | None, scale: float | None
    ) -> Tensor: ...


class SequenceAttention:
    """`Attend` for the distri, ring and ulysses axes of `context`, alone or together; local where all are 1.

    keys: those of the distri axis; by default fresh ones, which is exact.
    """

    def __init__(self, context: ParallelContext, keys: DistriKeys | None = None) -> None:
        self._distri = context.axis("distri")
        self._keys = keys or DistriKeys(self._distri)
        self._ring = context.axis("ring")
        self._ulysses = context.axis("ulysses")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Layer, *, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        if layer.num_shards == 1:
            return kernels.attention(q, k, v, mask=mask, scale=scale)
        assert layer.num_shards == self._distri.degree * self._ring.degree * self._ulysses.degree
        places = Places.of(layer.lengths, layer.num_shards)
        own = [places.sizes[rank] for rank in self._group(self._distri.index, self._ring.index)]
        assert q.shape[2] == k.shape[2] == own[self._ulysses.index], (
            f"{layer.path}: {q.shape[2]} queries and {k.shape[2]} keys on a rank that holds {own}"
        )
        num_heads = q.shape[1]
        if self._ulysses.degree > 1:
            q, k, v = heads_for_sequence([q, k, v], own, self._ulysses)
        if mask is not None:
            mask = heads_of_mask(mask, num_heads, self._ulysses)
        groups = [self._group(distri, self._ring.index) for distri in range(self._distri.degree)]
        lengths = [sum(places.sizes[rank] for rank in group) for group in groups]
        k, v = self._keys(k, v, layer.path, lengths)
        out = self._over_ring(q, k, v, places, mask, scale)
        return sequence_for_heads(out, own, num_heads, self._ulysses) if self._ulysses.degree > 1 else out

    def _over_ring(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        distris = range(self._distri.degree)
        blocks = [
            [rank for distri in distris for rank in self._group(distri, ring)]
            for ring in range(self._ring.degree)
        ]
        masks: list[Tensor | None] = [None] * len(blocks)
        if mask is not None:
            rows = places.tokens(self._group(self._distri.index, self._ring.index), q.device)
            seen = mask if mask.shape[2] == 1 else mask.index_select(2, rows)
            masks = [seen.index_select(3, places.tokens(block, q.device)) for block in blocks]
        if self._ring.degree == 1:
            return kernels.attention(q, k, v, mask=masks[0], scale=scale)
        lengths = [sum(places.sizes[rank] for rank in block) for block in blocks]
        return ring_attention(q, k, v, lengths, self._ring, masks=masks, scale=scale)

    def _group(self, distri: int, ring: int) -> range:
        """Places on the sequence axis of the ranks that differ on the ulysses axis only."""
        first = (distri * self._ring.degree + ring) * self._ulysses.degree
        return range(first, first + self._ulysses.degree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Which tokens of the whole sequence each rank holds: every stream is cut by itself.

    spans: rank → (first token, number of tokens) for each stream.
    """

    spans: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, lengths: Sequence[int], degree: int) -> Places:
        spans: list[list[tuple[int, int]]] = [[] for _ in range(degree)]
        offset = 0
        for length in lengths:
            sizes = shard_sizes(length, degree)
            for rank, start in enumerate(shard_starts(sizes)):
                spans[rank].append((offset + start, sizes[rank]))
            offset += length
        return cls(spans=spans)

    @property
    def sizes(self) -> list[int]:
        return [sum(size for _, size in spans) for spans in self.spans]

    def tokens(self, ranks: Sequence[int], device: torch.device) -> Tensor:
        """Whole-sequence indices of what `ranks` hold, in the order in which it comes together."""
        spans = [span for rank in ranks for span in self.spans[rank]]
        return torch.cat([torch.arange(first, first + size, device=device) for first, size in spans])


def heads_for_sequence(tensors_BHLD: list[Tensor], sizes: list[int], axis: Axis) -> list[Tensor]:
    """Trade sequence shards for head shards, all tensors in one all-to-all.

    sizes: the ranks' numbers of tokens. Returns [B, h, S, D] each; h by `shard_sizes`, may be 0.
    Collective: every rank on `axis` must call.
    """
    num_heads = tensors_BHLD[0].shape[1]
    heads = shard_sizes(num_heads, axis.degree)
    flat = [_per_head(tensors_BHLD) * count for count in heads]
    send = tensors_BHLD[0].new_empty(sum(flat))
    for start, part, count, first in zip(shard_starts(flat), flat, heads, shard_starts(heads), strict=True):
        for view, x in _views(send[start : start + part], tensors_BHLD, heads=count):
            view.copy_(x[:, first : first + count])
    mine = heads[axis.index]
    tokens = [[x.narrow(2, 0, 0) for x in tensors_BHLD] for _ in sizes]
    received_sizes = [_per_token(tensors_BHLD) * mine * size for size in sizes]
    received = exchange(send, flat, received_sizes, axis)
    for rank, (start, part) in enumerate(zip(shard_starts(received_sizes), received_sizes, strict=True)):
        views = _views(received[start : start + part], tensors_BHLD, heads=mine, tokens=sizes[rank])
        tokens[rank] = [view for view, _ in views]
    return [torch.cat(parts, 2) for parts in zip(*tokens, strict=True)]


def sequence_for_heads(x_BhSD: Tensor, sizes: list[int], num_heads: int, axis: Axis) -> Tensor:
    """Trade head shards back for sequence shards: [B, H, L, D]. Collective over `axis`."""
    batch, own_heads, _, dim = x_BhSD.shape
    heads = shard_sizes(num_heads, axis.degree)
    assert own_heads == heads[axis.index]
    send_sizes = [batch * own_heads * size * dim for size in sizes]
    send = torch.cat([part.reshape(-1) for part in x_BhSD.split(sizes, 2)])
    tokens = sizes[axis.index]
    receive_sizes = [batch * count * tokens * dim for count in heads]
    received = exchange(send, send_sizes, receive_sizes, axis)
    parts = [
        part.view(batch, count, tokens, dim)
        for part, count in zip(received.split(receive_sizes), heads, strict=True)
    ]
    return torch.cat(parts, 1)


def ring_attention(
    q_BhLD: Tensor,
    k_BhLD: Tensor,
    v_BhLD: Tensor,
    lengths: list[int],
    axis: Axis,
    *,
    masks: Sequence[Tensor | None],
    scale: float | None = None,
) -> Tensor:
    """Attention to the keys and values of every rank on `axis`, which pass by one block after the other.

    lengths: the ranks' numbers of keys; masks: for each rank's keys. Blocks travel at their true length.
    Collective: every rank on `axis` must call.
    """
    from yunchang.ring.utils import RingComm

    ring = RingComm(axis.group)
    kv = [k_BhLD, v_BhLD]
    merged: tuple[Tensor, Tensor] | None = None
    for step in range(axis.degree):
        block = (axis.index - step) % axis.degree
        coming = lengths[block - 1]
        last = step + 1 == axis.degree
        if not last:
            packed = torch.cat([x.reshape(-1) for x in kv])
            buffer = packed.new_empty(sum(x.shape[0] * x.shape[1] * coming * x.shape[3] for x in kv))
            ring.send_recv(packed, buffer)
            # Receiving first, for which yunchang has no switch: see `sequence._exchange_over_network`.
            ring._ops.reverse()
            ring.commit()
        piece = kernels.attention_with_lse(q_BhLD, kv[0], kv[1], mask=masks[block], scale=scale)
        merged = piece if merged is None else merge(*merged, *piece)
        if not last:
            with axis.traffic.timed("send", packed.nbytes, packed.device):
                ring.wait()
            sizes = [x.shape[0] * x.shape[1] * coming * x.shape[3] for x in kv]
            kv = [
                part.view(*x.shape[:2], coming, x.shape[3])
                for part, x in zip(buffer.split(sizes), kv, strict=True)
            ]
    assert merged is not None
    return merged[0].to(q_BhLD.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE over the keys of both; exact also where one or both saw no key (LSE -inf).

    Kept in the LSE's dtype, fp32 or wider, until the ring is closed.
    """
    total = torch.logaddexp(lse, other_lse)
    finite = total.masked_fill(total == -torch.inf, 0)  # -inf minus -inf is not a number
    weight, other_weight = ((x - finite).exp().unsqueeze(-1) for x in (lse, other_lse))
    return out.to(lse.dtype) * weight + other.to(lse.dtype) * other_weight, total


def heads_of_mask(mask: Tensor, num_heads: int, axis: Axis) -> Tensor:
    if mask.shape[1] == 1:
        return mask
    sizes = shard_sizes(num_heads, axis.degree)
    return mask.narrow(1, shard_starts(sizes)[axis.index], sizes[axis.index])


def _per_token(tensors: list[Tensor]) -> int:
    return sum(x.shape[0] * x.shape[3] for x in tensors)


def _per_head(tensors: list[Tensor]) -> int:
    return sum(x.shape[0] * x.shape[2] * x.shape[3] for x in tensors)


def _views(
    flat: Tensor, tensors: list[Tensor], *, heads: int, tokens: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """`flat` as one [B, heads, tokens, D] view for each of `tensors`, with that tensor."""
    shapes = [(x.shape[0], heads, x.shape[2] if tokens is None else tokens, x.shape[3]) for x in tensors]
    sizes = [b * h * s * d for b, h, s, d in shapes]
    return [
        (part.view(shape), x) for part, shape, x in zip(flat.split(sizes), shapes, tensors, strict=True)
    ]
