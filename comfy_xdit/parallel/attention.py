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
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .context import Axis, ParallelContext
from .distri import DistriKeys
from .sequence import Runs, exchange, shard_sizes, shard_starts, shards_of_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """An attention module in a forward: its path, and the whole lengths of its streams in order.

    num_shards: over how many ranks the tokens are cut; 1 where there are too few, and every rank holds all.
    runs: the tokens of each stream that the forward computes; None for all.
    key_lengths: of the streams of keys and values, where those are others than the queries' (video that attends to
    audio); they are cut over the same ranks. key_runs: of these, as `runs`.
    has_own_mask: a mask is for the keys that the forward computes, not for all.
    """

    path: str
    lengths: tuple[int, ...]
    num_shards: int
    runs: tuple[Runs, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    key_runs: tuple[Runs, ...] | None = None
    has_own_mask: bool = False


class Attend(Protocol):
    """Attention as a parallel method does it; the one seam between models and methods.

    q, k, v: [B, H, L, D], this rank's tokens, stream after stream.
    mask: over the whole sequences, [B or 1, H or 1, S or 1, S of the keys], bool (True = seen) or additive.
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
        key_places = places if layer.key_lengths is None else Places.of(layer.key_lengths, layer.num_shards)
        group = self._group(self._distri.index, self._ring.index)
        own, own_keys = ([at.sizes[rank] for rank in group] for at in (places, key_places))
        held = own[self._ulysses.index], own_keys[self._ulysses.index]
        assert (q.shape[2], k.shape[2]) == held, (
            f"{layer.path}: {q.shape[2]} queries and {k.shape[2]} keys on a rank that holds {held}"
        )
        num_heads = q.shape[1]
        if self._ulysses.degree > 1 and layer.key_lengths is None:
            q, k, v = heads_for_sequence([q, k, v], own, self._ulysses)
        elif self._ulysses.degree > 1:
            (q,) = heads_for_sequence([q], own, self._ulysses)
            k, v = heads_for_sequence([k, v], own_keys, self._ulysses)
        if mask is not None:
            mask = heads_of_mask(mask, num_heads, self._ulysses)
        groups = [self._group(distri, self._ring.index) for distri in range(self._distri.degree)]
        lengths = [sum(key_places.sizes[rank] for rank in group) for group in groups]
        k, v = self._keys(k, v, layer.path, lengths)
        out = self._over_ring(q, k, v, (places, key_places), mask, scale)
        return sequence_for_heads(out, own, num_heads, self._ulysses) if self._ulysses.degree > 1 else out

    def _over_ring(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: tuple[Places, Places],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """places: of the queries, and of the keys."""
        queries, keys = places
        distris = range(self._distri.degree)
        blocks = [
            [rank for distri in distris for rank in self._group(distri, ring)]
            for ring in range(self._ring.degree)
        ]
        masks: list[Tensor | None] = [None] * len(blocks)
        if mask is not None:
            rows = queries.tokens(self._group(self._distri.index, self._ring.index), q.device)
            seen = mask if mask.shape[2] == 1 else mask.index_select(2, rows)
            masks = [seen.index_select(3, keys.tokens(block, q.device)) for block in blocks]
        if self._ring.degree == 1:
            return kernels.attention(q, k, v, mask=masks[0], scale=scale)
        lengths = [sum(keys.sizes[rank] for rank in block) for block in blocks]
        return ring_attention(q, k, v, lengths, self._ring, masks=masks, scale=scale)

    def _group(self, distri: int, ring: int) -> range:
        """Places on the sequence axis of the ranks that differ on the ulysses axis only."""
        first = (distri * self._ring.degree + ring) * self._ulysses.degree
        return range(first, first + self._ulysses.degree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Which tokens of the whole sequence each rank holds: every stream is cut by itself.

    spans: rank → (first token, number of tokens), stream after stream.
    """

    spans: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, lengths: Sequence[int], degree: int, runs: Sequence[Runs] | None = None) -> Places:
        """runs: of each stream that are held; None for all of it."""
        spans: list[list[tuple[int, int]]] = [[] for _ in range(degree)]
        held = runs or [((0, length),) for length in lengths]
        for offset, of_stream in zip(shard_starts(list(lengths)), held, strict=True):
            for rank, parts in enumerate(shards_of_runs(of_stream, degree)):
                spans[rank] += [(offset + first, size) for first, size in parts]
        return cls(spans=spans)

    @property
    def sizes(self) -> list[int]:
        return [sum(size for _, size in spans) for spans in self.spans]

    def tokens(self, ranks: Sequence[int], device: torch.device) -> Tensor:
        """Whole-sequence indices of what `ranks` hold, in the order in which it comes together."""
        spans = [span for rank in ranks for span in self.spans[rank]]
        return torch.cat([torch.arange(first, first + size, device=device) for first, size in spans])


def heads_for_sequence(tensors_BHLD: list[Tensor], sizes: list[int], axis: Axis) -> list[Tensor]:
    """Trade sequence shards for head shards, all tensors, which are of one shape, in one all-to-all.

    sizes: the ranks' numbers of tokens. Returns [B, h, S, D] each; h by `shard_sizes`, may be 0.
    Where the degree divides the heads this is one operation before the exchange and one after it.
    Collective: every rank on `axis` must call.
    """
    batch, num_heads, tokens, dim = tensors_BHLD[0].shape
    assert all(x.shape == tensors_BHLD[0].shape for x in tensors_BHLD), "queries, keys and values are of one shape"
    num, heads = len(tensors_BHLD), shard_sizes(num_heads, axis.degree)
    send_sizes = [num * batch * count * tokens * dim for count in heads]
    mine = heads[axis.index]
    receive_sizes = [num * batch * mine * size * dim for size in sizes]
    received = exchange(_heads_for_ranks(tensors_BHLD, heads), send_sizes, receive_sizes, axis)
    # From each rank [num, B, L, h, D]; three dims are all that a kernel for many tensors takes.
    parts = zip(received.split(receive_sizes), sizes, strict=True)
    joined = torch.cat([part.view(num * batch, size, mine * dim) for part, size in parts], 1)
    return [x.transpose(1, 2) for x in joined.view(num, batch, sum(sizes), mine, dim).unbind(0)]


def _heads_for_ranks(tensors_BHLD: list[Tensor], heads: list[int]) -> Tensor:
    """A flat buffer of each rank's heads, rank after rank, as [tensor, B, L, h, D]."""
    batch, _, tokens, dim = tensors_BHLD[0].shape
    degree, by_token = len(heads), [x.transpose(1, 2) for x in tensors_BHLD]
    if len(set(heads)) > 1:
        together = torch.stack(by_token)
        return torch.cat([part.reshape(part.numel()) for part in together.split(heads, 3)])
    if all(x.is_contiguous() for x in by_token):
        # As many dims as a kernel for many tensors takes.
        rows = [x.view(batch * tokens, degree, heads[0] * dim).transpose(0, 1) for x in by_token]
    else:
        rows = [x.unflatten(2, (degree, heads[0])).movedim(2, 0) for x in by_token]
    return torch.stack(rows, 1).flatten()


def sequence_for_heads(x_BhSD: Tensor, sizes: list[int], num_heads: int, axis: Axis) -> Tensor:
    """Trade head shards back for sequence shards: [B, H, L, D]. Collective over `axis`.

    Where the degree divides heads and tokens this is one operation before the exchange, at most, and one after it.
    """
    batch, own_heads, _, dim = x_BhSD.shape
    heads = shard_sizes(num_heads, axis.degree)
    assert own_heads == heads[axis.index]
    send_sizes = [batch * own_heads * size * dim for size in sizes]
    by_token = x_BhSD.transpose(1, 2)
    if len(set(sizes)) == 1:
        send = by_token.unflatten(1, (axis.degree, sizes[0])).transpose(0, 1).flatten()
    else:
        send = torch.cat([part.reshape(part.numel()) for part in by_token.split(sizes, 1)])
    tokens = sizes[axis.index]
    receive_sizes = [batch * count * tokens * dim for count in heads]
    parts = zip(exchange(send, send_sizes, receive_sizes, axis).split(receive_sizes), heads, strict=True)
    joined = torch.cat([part.view(batch * tokens, count * dim) for part, count in parts], 1)
    return joined.view(batch, tokens, num_heads, dim).transpose(1, 2)


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
    assert k_BhLD.shape == v_BhLD.shape, "keys and values are of one shape"
    batch, heads, _, dim = k_BhLD.shape
    kv = torch.stack([k_BhLD.transpose(1, 2), v_BhLD.transpose(1, 2)])
    out, lse = q_BhLD, q_BhLD
    sees_all = all(lengths) and all(mask is None for mask in masks)
    for step in range(axis.degree):
        block = (axis.index - step) % axis.degree
        last = step + 1 == axis.degree
        if not last:
            coming = kv.new_empty((2, batch, lengths[block - 1], heads, dim))
            works = _pass_on(kv, coming, axis)
        k, v = (x.transpose(1, 2) for x in kv.unbind(0))
        piece, piece_lse = kernels.attention_with_lse(q_BhLD, k, v, mask=masks[block], scale=scale)
        if step == 0:
            out, lse = piece.to(piece_lse.dtype), piece_lse
        else:
            out = blend(out, lse, piece, piece_lse, sees_all=sees_all)
            lse = lse if last else torch.logaddexp(lse, piece_lse)
        if not last:
            with axis.traffic.timed("send", kv.nbytes, kv.device):
                for work in works:
                    work.wait()
            kv = coming
    return out.to(q_BhLD.dtype)


def _pass_on(x: Tensor, coming: Tensor, axis: Axis) -> list[dist.Work]:
    """Send `x` to the next rank and receive `coming` from the one before."""
    before, after = axis.ranks[axis.index - 1], axis.ranks[(axis.index + 1) % axis.degree]
    # Receiving first: see `sequence._exchange_over_network`.
    todo = [(dist.irecv, coming, before), (dist.isend, x, after)]
    group = axis.group
    return dist.batch_isend_irecv([dist.P2POp(run, tensor, peer, group) for run, tensor, peer in todo])


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE over the keys of both, in the LSE's dtype; exact also where one or both saw no key (LSE -inf)."""
    return blend(out, lse, other, other_lse), torch.logaddexp(lse, other_lse)


def blend(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, *, sees_all: bool = False) -> Tensor:
    """As `merge`, the output alone. In the LSE's dtype, fp32 or wider, in which it is kept until the ring is closed.

    sees_all: every query has seen keys in both, which saves a kernel.
    """
    weight = torch.sigmoid(lse - other_lse)
    if not sees_all:
        # What saw no key has no weight; where both did, both are 0, and -inf minus -inf is not a number.
        weight = weight.nan_to_num(0.5)
    return torch.lerp(other.to(lse.dtype), out.to(lse.dtype), weight.unsqueeze(-1))


def heads_of_mask(mask: Tensor, num_heads: int, axis: Axis) -> Tensor:
    if mask.shape[1] == 1:
        return mask
    sizes = shard_sizes(num_heads, axis.degree)
    return mask.narrow(1, shard_starts(sizes)[axis.index], sizes[axis.index])
