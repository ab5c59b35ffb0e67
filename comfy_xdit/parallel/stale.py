"""Attention of a patch to keys and values of the whole sequence, of which the other patches' are older.

A pipeline computes one patch of the tokens after the other (`patch_tokens.py`). Each layer keeps the keys and
values of all tokens; a patch puts its fresh ones in their places, then attends to everything. So a patch
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


class StaleAttention:
    """`Attend` with buffers, for tokens spread over the ring and ulysses axes of `context`, or on one rank.

    The buffers hold each layer's keys and values in the order of its streams, whatever the degrees are: of
    the ulysses axis' ranks each has its own heads of all tokens; ranks of the ring axis send each other the
    fresh ones of the patch, as much as a ring sends, and hold all of them.
    Buffers live until `close`, which the end of a `with` calls. most_bytes_held: what they took at most.
    Collective over both axes.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._ring = context.axis("ring")
        self._ulysses = context.axis("ulysses")
        self._kept: dict[Hashable, dict[tuple[str, int], tuple[Tensor, ...]]] = {}
        self._run: Hashable = None
        self._keep = False
        self._first, self._num_rows = 0, 1
        self.most_bytes_held = 0

    def begin(self, run: Hashable, *, keep: bool, first: int, num_rows: int) -> None:
        """What follows computes rows that belong to `run`, from its `first` on; buffers are for all `num_rows`.

        A forward of all their tokens fills them if `keep`; those of patches need them filled.
        """
        self._run, self._keep = run, keep
        self._first, self._num_rows = first, num_rows

    def forget(self, run: Hashable) -> None:
        """No patch of `run` will be computed any more."""
        self._kept.pop(run, None)

    def close(self) -> None:
        self._kept.clear()

    def _bytes_held(self) -> int:
        return sum(x.nbytes for layers in self._kept.values() for kept in layers.values() for x in kept)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Layer, *, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        places, keys = places_of(layer)
        if not sum(places.sizes):
            return q  # the patch has no token of this layer's streams, on any rank
        ring, ulysses = (axis if layer.num_shards > 1 else axis.alone for axis in (self._ring, self._ulysses))
        rings = [range(each * ulysses.degree, (each + 1) * ulysses.degree) for each in range(ring.degree)]
        beside = rings[ring.index]
        own, own_keys = ([at.sizes[rank] for rank in beside] for at in (places, keys))
        num_heads = q.shape[1]
        if ulysses.degree > 1 and own == own_keys:
            q, k, v = heads_for_sequence([q, k, v], own, ulysses)
        elif ulysses.degree > 1:
            (q,) = heads_for_sequence([q], own, ulysses)
            k, v = heads_for_sequence([k, v], own_keys, ulysses)
        lengths = [sum(keys.sizes[rank] for rank in group) for group in rings]
        k, v = gathered([k, v], lengths, ring)
        spans = [span for group in rings for rank in group for span in keys.spans[rank]]
        k, v = self._renewed(layer, spans, k, v)
        if mask is not None and layer.has_own_mask:
            (mask,) = self._renewed(layer, _runs_of(layer), mask.transpose(2, 3).expand(k.shape[0], -1, -1, -1))
            mask = mask.transpose(2, 3)
        if mask is not None:
            mask = heads_of_mask(mask, num_heads, ulysses)
            if mask.shape[2] > 1:
                mask = mask.index_select(2, places.tokens(beside, q.device))
        out = kernels.attention(q, k, v, mask=mask, scale=scale)
        return sequence_for_heads(out, own, num_heads, ulysses) if ulysses.degree > 1 else out

    def _renewed(self, layer: Layer, spans: list[tuple[int, int]], *fresh: Tensor) -> tuple[Tensor, ...]:
        """The run's whole buffers, with fresh tensors, which come span after span along dim 2, in their places."""
        # A mask has buffers of its own.
        key = (layer.path, len(fresh))
        kept = self._kept.get(self._run, {}).get(key)
        rows = fresh[0].shape[0]
        first, num_rows = (self._first, self._num_rows) if kept is not None or self._keep else (0, rows)
        if kept is None:
            assert layer.runs is None, f"{layer.path}: nothing was kept of the other tokens"
            length = sum(layer.key_lengths or layer.lengths)
            kept = tuple(x.new_empty((num_rows, x.shape[1], length, x.shape[3])) for x in fresh)
            if self._keep:
                self._kept.setdefault(self._run, {})[key] = kept
                self.most_bytes_held = max(self.most_bytes_held, self._bytes_held())
        own = tuple(whole[first : first + rows] for whole in kept)
        for whole, new in zip(own, fresh, strict=True):
            parts = new.split([size for _, size in spans], 2)
            for (start, size), part in zip(spans, parts, strict=True):
                whole.narrow(2, start, size).copy_(part)
        return own

    def __enter__(self) -> StaleAttention:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def places_of(layer: Layer) -> tuple[Places, Places]:
    """Where the tokens that each rank computes stand in the whole sequence; and their keys."""
    places = Places.of(layer.lengths, layer.num_shards, layer.runs)
    if layer.key_lengths is None:
        return places, places
    return places, Places.of(layer.key_lengths, layer.num_shards, layer.key_runs)


def _runs_of(layer: Layer) -> list[tuple[int, int]]:
    """The runs of keys that the forward computes, in the whole sequence."""
    lengths, runs = layer.key_lengths or layer.lengths, layer.key_runs if layer.key_lengths else layer.runs
    return Places.of(lengths, 1, runs).spans[0]


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
